"""PiToMe, CubistMerge and StructSAM: their steps against cases worked by hand, and how many tokens they leave."""

import math

import pytest
import torch
from models import images, make_model, predict

from ailurus_hf import AiluRusError
from benchmarks.peers import cubistmerge, pitome, structsam
from benchmarks.peers.leaders import means_by_size


def at_angles(*degrees):
    radians = torch.tensor(degrees, dtype=torch.float32) * math.pi / 180
    return torch.stack([radians.cos(), radians.sin()], -1)[None]


def test_means_weigh_tokens_by_size_and_padding_has_none():
    sizes = torch.tensor([[1.0, 2, 1, 3, 0]])
    means, merged = means_by_size(torch.arange(5.0)[None, :, None], sizes, torch.tensor([[0, 0, 1, 1, 2]]), 3)
    assert means[0, :, 0].tolist() == pytest.approx([2 / 3, 11 / 4, 0]) and merged.tolist() == [[3, 4, 0]]


def test_pitome_protects_what_has_few_alike():
    found = pitome.energies(torch.tensor([[[1.0, 0.5], [0.5, 1.0]]]), 0.75)
    torch.testing.assert_close(found, torch.full((1, 2), (0.25 + math.exp(-0.25) - 1) / 2))
    # A group of four from 0 to 12 degrees, and a pair of its own at 200. By energy: 4, 8, 0, 12, 201 and 200 degrees.
    tokens = at_angles(0, 200, 4, 8, 201, 12)
    # Of the two of most energy 4 goes to 8; of four, 0 goes there too (8 degrees) and not to 12.
    assert pitome.match_by_energy(tokens, 1, 0.5, protect=True).tolist() == [[0, 1, 3, 3, 4, 5]]
    assert pitome.match_by_energy(tokens, 2, 0.5, protect=True).tolist() == [[3, 1, 3, 3, 4, 5]]
    # Where none is protected, 201 stands against 200, and theirs is the strongest edge.
    assert pitome.match_by_energy(tokens, 1, 0.5, protect=False).tolist() == [[0, 1, 2, 3, 1, 5]]


def test_pitome_leaves_a_share_in_every_layer():
    model = make_model("ViTModel")
    with pitome.apply(model, keep=0.9, protect_from=0) as applied:
        predict(model, "ViTModel", images(1))
        # 96 - floor(9.6), 87 - floor(8.7), 79 - floor(7.9), 72 - floor(7.2).
        assert applied.peers[0].token_counts == [96, 87, 79, 72, 65]
        assert applied.peers[0].sizes.sum() == 96


def test_cubistmerge_pairs_neighbors_of_a_line():
    # Edges of 10, 5, 25 and 1 degree: 10 goes to the right (5) and 40 too (1), which is the strongest.
    line = at_angles(0, 10, 15, 40, 41)
    assert cubistmerge.match_beside(line, 1).tolist() == [[0, 1, 2, 3, 3]]
    assert cubistmerge.match_beside(line, 2).tolist() == [[0, 1, 1, 2, 2]]
    # The last of an even number has a left neighbor only.
    assert cubistmerge.match_beside(line[:, :4], 2).tolist() == [[0, 1, 1, 1]]
    tokens = torch.tensor([[[1.0, -5, 0], [-3, 2, 4], [2, 4, -1]]])
    merged = cubistmerge.largest(tokens, torch.tensor([[0, 0, 1]]), 2)
    assert merged.tolist() == [[[-3, -5, 4], [2, 4, -1]]]


def test_cubistmerge_keeps_a_grid():
    # In the upper row 10 goes to 15, in the lower one 2 goes to 0.
    image = torch.cat([at_angles(0, 10, 15), at_angles(0, 2, 50)])[None]
    merged, to = cubistmerge.shortened(image, 1, axis=2)
    assert merged.shape == (1, 2, 2, 2) and to.tolist() == [[0, 1, 1, 2, 2, 3]]
    # The same with rows and columns exchanged.
    turned, back = cubistmerge.shortened(image.transpose(1, 2), 1, axis=1)
    torch.testing.assert_close(turned, merged.transpose(1, 2))
    assert back.tolist() == [[0, 1, 2, 1, 2, 3]]
    model = make_model("ViTModel")
    for cells in ((8, 9), (4, 7), (1, 2)):
        with cubistmerge.apply(model, location=1, cells=cells) as applied:
            predict(model, "ViTModel", images(1))
            assert applied.peers[0].token_counts[1:3] == [96, math.prod(cells)]


def test_structsam_merges_flat_cells_into_their_flattest_token():
    ramp = torch.tensor([0.0, 1, 2, 3])[None, :, None]
    assert structsam.gradients(ramp, (1, 4)).tolist() == [[4, 8, 8, 4]]
    assert structsam.gradients(torch.cat([ramp, ramp], -1), (4, 1)).tolist() == [[4, 8, 8, 4]]
    # Two cells. The left one is flat but for its right half, which is beside the edge; of equal ones the first stays.
    row = at_angles(0, 0, 20, 90)
    tokens = torch.cat([row, row], 1)
    assert structsam.match_flat(tokens, (2, 4), 3).tolist() == [[0, 0, 2, 3, 0, 0, 6, 7]]
    # In the mirror, the first token of the cell is not the flattest.
    assert structsam.match_flat(tokens.flip(1), (2, 4), 3).tolist() == [[0, 1, 3, 3, 4, 5, 3, 3]]
    # All three are as much alike: those of least energy go first.
    assert structsam.match_flat(tokens, (2, 4), 2).tolist() == [[0, 0, 2, 3, 0, 5, 6, 7]]


def test_structsam_takes_whole_cells_as_large_as_need_be():
    assert structsam.whole_cells((3, 5), 6).tolist() == [[0, 1, 5, 6], [2, 3, 7, 8]]
    assert structsam.whole_cells((3, 5), 7).tolist() == [[0, 1, 2, 5, 6, 7, 10, 11, 12]]
    with pytest.raises(AiluRusError, match="3 x 5"):
        structsam.whole_cells((3, 5), 9)


def test_structsam_attends_from_fewer_tokens_and_returns_all():
    model, seen = make_model("ViTModel"), []
    attention = model.layers[0].attention
    with structsam.apply(model, keep=0.25) as applied:
        handle = attention.q_proj.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
        predict(model, "ViTModel", images(1))
        handle.remove()
        assert seen == [1 + 24] and set(applied.peers[0].token_counts) == {96}
