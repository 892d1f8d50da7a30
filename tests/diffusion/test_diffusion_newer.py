"""What is special about the networks after Flux and Wan: positions, padded texts, text and image in one sequence,
ControlNets, and what cannot follow."""

import inspect

import pytest
import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusion_models import NETWORKS, SETTINGS, latents, make_network, predict
from diffusion_ways import duplicated, in_both_scopes, sample
from tiny_network import text, text_mask

from ailurus_hf import AiluRusError, ailurus_status, apply_ailurus, remove_ailurus
from ailurus_hf.clusters import TokenClusters
from ailurus_hf.diffusion import denoising
from ailurus_hf.diffusion.rotary import at_centroids, of_complex
from ailurus_hf.diffusion.token_order import IMAGE_FIRST, TEXT_FIRST, ImageAmongText

# Positions


def embedding(cells, widths, first=0.0):
    parts = [get_1d_rotary_pos_embed(n, cells[:, axis] + first, use_real=True) for axis, n in enumerate(widths)]
    return tuple(torch.cat(part, 1) for part in zip(*parts, strict=True))


@pytest.mark.parametrize("grid", [(8, 12), (3, 4, 6), (1, 4, 6)])
@pytest.mark.parametrize("first", [0.0, -3.0])
def test_representatives_are_rotated_at_their_mean_position(grid, first):
    cells = torch.cartesian_prod(*(torch.arange(float(side)) for side in grid))
    widths = (4, 6, 6)[: len(grid)]
    # Two neighbors in a row; in the second image, in a column.
    pairs = [cells.clone(), cells.clone()]
    pairs[0][:, -1] //= 2
    pairs[1][:, -2] //= 2
    assignment = torch.stack([each.unique(dim=0, return_inverse=True)[1] for each in pairs])
    clusters = TokenClusters.from_assignment(assignment, len(cells) // 2)
    cos, sin = at_centroids(embedding(cells, widths, first), clusters, grid)
    for image in range(2):
        want = embedding(clusters.centroids(grid)[image], widths, first)
        torch.testing.assert_close((cos[image], sin[image]), want, rtol=1e-5, atol=1e-5)


def test_complex_factors_are_cosines_and_sines_of_pairs_of_channels():
    cells = torch.arange(5.0)
    factors = get_1d_rotary_pos_embed(8, cells, use_real=False)
    torch.testing.assert_close(of_complex(factors), get_1d_rotary_pos_embed(8, cells, use_real=True))


# Text and image in one sequence


@pytest.mark.parametrize("order", [IMAGE_FIRST, TEXT_FIRST, ImageAmongText(starts=torch.tensor([0, 2, 5]))])
def test_text_and_image_are_taken_apart_and_joined_again(order):
    tokens = torch.arange(36.0).view(3, 12, 1)
    others, image = order.split(tokens, 7)
    assert others.shape[1] == 5 and image.shape[1] == 7
    assert torch.equal(order.join(others, image), tokens)
    # Fewer image tokens stand where there were more.
    assert torch.equal(order.split(order.join(others, image[:, :3]), 3)[1], image[:, :3])


def test_each_image_stands_after_its_own_text():
    tokens = torch.arange(20).view(2, 10, 1)
    others, image = ImageAmongText(starts=torch.tensor([1, 3])).split(tokens, 4)
    assert image.squeeze(-1).tolist() == [[1, 2, 3, 4], [13, 14, 15, 16]]
    assert others.squeeze(-1).tolist() == [[0, 5, 6, 7, 8, 9], [10, 11, 12, 17, 18, 19]]


@pytest.mark.parametrize("name", ["Qwen-Image", "HunyuanVideo", "Lumina 2"])
@in_both_scopes
def test_padding_of_a_text_is_not_seen(name, scope):
    network, x = apply_ailurus(make_network(name), **SETTINGS, scope=scope), sample(name)
    other = torch.where(text_mask(2)[..., None].bool(), text(2), 5 * text(2, seed=8))
    seen = predict(network, name, x)
    torch.testing.assert_close(predict(network, name, x, encoder_hidden_states=other), seen, rtol=1e-4, atol=1e-4)
    other = text(2, seed=8)
    assert not torch.allclose(predict(network, name, x, encoder_hidden_states=other), seen, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["Chroma", "Flux.2", "Bria", "LongCat-Image", "Ovis-Image"])
@pytest.mark.parametrize("location", [2, 3])
def test_tokens_are_merged_in_blocks_of_one_sequence(name, location):
    # The first two blocks have text and image apart.
    network, fields = make_network(name), {**SETTINGS, "cluster_location": location}
    NETWORKS[name].no_positions(network)
    shape, times = NETWORKS[name].small
    doubled = duplicated(latents(shape), times)
    plain = predict(network, name, doubled)
    reduced = predict(apply_ailurus(network, **fields), name, doubled)
    assert ailurus_status(network).locations[0].num_clusters == 16
    torch.testing.assert_close(reduced, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())
    x = sample(name)
    assert not torch.allclose(predict(network, name, x), predict(remove_ailurus(network), name, x), rtol=1e-3)


# A timestep for each token


def of_a_given_first_frame(batch, num_tokens=48):
    """The first of three frames is given, as in image-to-video."""
    return torch.tensor([0, 500, 500]).repeat_interleave(num_tokens // 3).repeat(batch, 1)


@pytest.mark.parametrize("name", ["Wan", "LTX-Video"])
def test_tokens_are_merged_with_their_timesteps(name):
    network = make_network(name)
    NETWORKS[name].no_positions(network)
    shape, times = NETWORKS[name].small
    doubled = duplicated(latents(shape), times)
    timesteps = of_a_given_first_frame(len(doubled))
    plain = predict(network, name, doubled, timesteps)
    # The cells of k-means do not lie on the duplicates.
    apply_ailurus(network, **SETTINGS, clustering="density_peaks")
    reduced = predict(network, name, doubled, timesteps)
    torch.testing.assert_close(reduced, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())
    of_one = predict(network, name, doubled, 500)
    assert not torch.allclose(reduced, of_one, rtol=1e-2, atol=1e-2 * plain.abs().max().item())


def test_steps_are_told_by_the_timesteps_of_tokens_that_are_made():
    network, x, seen = apply_ailurus(make_network("Wan"), **SETTINGS, unreduced_first_steps=1), sample("Wan"), []
    for timestep in (900, 600, 300, 900):
        predict(network, "Wan", x, of_a_given_first_frame(2, 72).clamp(max=timestep // 2))
        seen.append(ailurus_status(network).locations[0].num_clusters)
    assert seen == [72, 18, 18, 72]


@pytest.mark.parametrize("name, blocks", [("Wan", "blocks"), ("LTX-Video", "transformer_blocks")])
def test_a_cluster_of_several_timesteps_gets_the_mean_of_what_blocks_make_of_them(name, blocks):
    network, x, given = apply_ailurus(make_network(name), **SETTINGS), sample(name), []
    last = getattr(network, blocks)[-1]
    names = list(inspect.signature(last.forward).parameters)
    for before_merging in (True, False):
        last.register_forward_pre_hook(
            lambda _, args, kwargs: given.append({**dict(zip(names, args)), **kwargs}["temb"]),
            prepend=before_merging,
            with_kwargs=True,
        )
    timesteps = torch.randint(0, 900, (2, 72), generator=torch.manual_seed(0))
    assert predict(network, name, x, timesteps).isfinite().all()
    (of_tokens, of_clusters), assignment = given, ailurus_status(network).last_clusters.assignment
    for number in (0, of_clusters.shape[1] - 1):
        want = of_tokens[1, assignment[1] == number].mean(0)
        torch.testing.assert_close(of_clusters[1, number], want, rtol=1e-5, atol=1e-5)


# ControlNets


@pytest.mark.parametrize("name", [name for name in NETWORKS if NETWORKS[name].each])
def test_a_control_gives_all_tokens_what_each_block_gave(name):
    network, x = make_network(name), sample(name)
    plain = predict(network, name, x)
    reduced = predict(apply_ailurus(network, **{**SETTINGS, "cluster_location": 1}), name, x)
    size = 96 * 16
    assert plain.shape == reduced.shape and plain.shape[1] == size * len(network.controlnet_blocks) + size * (
        name == "Flux ControlNet"
    )
    # The first block ran before tokens were merged.
    torch.testing.assert_close(reduced[:, :size], plain[:, :size], rtol=1e-5, atol=1e-5)
    assert all(not torch.allclose(*each) for each in zip(reduced.split(size, 1)[1:], plain.split(size, 1)[1:]))
    apply_ailurus(network, **SETTINGS, full_every=2)
    with pytest.raises(AiluRusError, match=f"{type(network).__name__}.*each gave"), denoising(network):
        predict(network, name, x)


# What cannot follow

REFUSED_CALLS = [
    ("SkyReels-V2", {"enable_diffusion_forcing": True}, "enable_diffusion_forcing"),
    ("SkyReels-V2", {"timestep": torch.full((2, 3), 5)}, r"timesteps \(2, 3\) are of single frames.*\(2,\)"),
    ("LTX-Video", {"video_coords": torch.zeros(2, 3, 72)}, "video_coords"),
    ("LTX-Video", {"attention_kwargs": {"grid": (3, 6, 4)}}, r"\(3, 4, 6\), got \(3, 6, 4\)"),
    ("Flux.2", {"kv_cache_mode": "extract"}, "kv_cache_mode='extract'"),
    ("Kandinsky 5", {"sparse_params": {"to_fractal": False}}, "sparse_params"),
    ("Qwen-Image", {"img_shapes": [[(1, 8, 12), (1, 8, 12)]] * 2}, "192 tokens, but the network is called with 96"),
    ("Qwen-Image", {"img_shapes": [[(1, 8, 12)], [(1, 12, 8)]]}, "the same for all images"),
    ("Qwen ControlNet", {"img_shapes": [[(1, 4, 12), (1, 4, 12)]] * 2}, "must be of one image"),
    ("Qwen-Image", {"controlnet_block_samples": [torch.ones(2, 96, 16)]}, "controlnet_block_samples"),
    # Its pipelines give no picture beside the one that is made.
    (
        "Ovis-Image",
        {"img_ids": torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(12))},
        "reference",
    ),
    ("Bria", {"attention_kwargs": {"attention_mask": torch.ones(2, 101)}}, "attention_mask in attention_kwargs"),
    ("Bria", {"controlnet_block_samples": [torch.ones(2, 96, 16)]}, "controlnet_block_samples"),
    ("Z-Image", {"controlnet_block_samples": {0: torch.ones(2, 160, 16)}}, "controlnet_block_samples"),
    ("Z-Image", {"image_noise_mask": [[1], [1]]}, "image_noise_mask"),
]


@pytest.mark.parametrize("name, given, message", REFUSED_CALLS, ids=[f"{n}-{m}" for n, _, m in REFUSED_CALLS])
def test_calls_that_cannot_be_followed_are_refused(name, given, message):
    network = apply_ailurus(make_network(name), **SETTINGS)
    with pytest.raises(AiluRusError, match=message):
        predict(network, name, sample(name), **given)


def test_networks_that_set_tokens_apart_are_refused():
    for name, field, value in (
        ("SkyReels-V2", "num_frame_per_block", 3),
        ("HunyuanVideo", "image_condition_type", "token_replace"),
    ):
        network = apply_ailurus(make_network(name), **SETTINGS)
        network.register_to_config(**{field: value})
        with pytest.raises(AiluRusError, match="merged tokens"):
            predict(network, name, sample(name))


def test_images_of_several_sizes_are_refused():
    network = apply_ailurus(make_network("Z-Image"), **SETTINGS)
    images = [torch.zeros(4, 1, 16, 24), torch.zeros(4, 1, 24, 16)]
    with pytest.raises(AiluRusError, match=r"one size.*\(4, 1, 24, 16\)"):
        network(images, t=torch.ones(2), cap_feats=list(text(2)))
