"""What is special about Wan: frames, rows and columns, rotated at centroids in three dimensions."""

import pytest
import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusion_models import SETTINGS, latents, make_network, predict, text
from diffusion_ways import sample
from transformer_pipelines import generate_with_guidance, make_transformer_pipeline

from ailurus_hf import AiluRusDiffusionConfig, AiluRusError, ailurus_status, apply_ailurus, remove_ailurus
from ailurus_hf.clusters import TokenClusters
from ailurus_hf.diffusion.apply import install

# Wan: frames, rows and columns


def twos_along(axis_of_each_video):
    """A clustering: each video's neighbors along an axis of its own, two by two."""

    def clustering(features, grid, num_clusters):
        assignments = []
        for axis in axis_of_each_video:
            cells = torch.cartesian_prod(*(torch.arange(side) for side in grid))
            cells[:, axis] //= 2
            assignments.append(cells.unique(dim=0, return_inverse=True)[1])
        return TokenClusters.from_assignment(torch.stack(assignments), num_clusters)

    return clustering


@pytest.mark.parametrize("axes", [(0, 1), (2, 0)])
def test_representatives_of_a_video_are_rotated_at_their_mean_position(axes):
    network = make_network("Wan")
    video = latents((4, 4, 8, 12))
    for number, axis in enumerate(axes):
        # Two tokens alike: two frames, or four rows or columns of patches of two.
        patch = (1, 2, 2)[axis]
        pairs = video[number].unflatten(1 + axis, (-1, 2, patch))
        pairs.select(2 + axis, 1).copy_(pairs.select(2 + axis, 0).clone())
    install(network, AiluRusDiffusionConfig(keep_ratio=0.5, min_tokens=1, cluster_location=0), twos_along(axes))
    reduced = predict(network, "Wan", video)
    plain = predict(remove_ailurus(network), "Wan", video)
    for number, axis in enumerate(axes):
        cells = torch.cartesian_prod(*(torch.arange(float(side)) for side in (4, 4, 6)))
        cells[:, axis] = cells[:, axis] // 2 * 2 + 0.5
        widths = (network.rope.t_dim, network.rope.h_dim, network.rope.w_dim)
        parts = [
            get_1d_rotary_pos_embed(width, cells[:, i], use_real=True, freqs_dtype=torch.float64)
            for i, width in enumerate(widths)
        ]
        rotary = tuple(torch.cat(part, 1)[None, :, None] for part in zip(*parts, strict=True))
        hook = network.rope.register_forward_hook(lambda module, args, output, rotary=rotary: rotary)
        want = predict(network, "Wan", video)[number]
        hook.remove()
        torch.testing.assert_close(reduced[number], want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
        assert (plain[number] - want).abs().max() > 1e-2 * want.abs().max()


def test_what_wan_cannot_follow_is_refused():
    network, x = apply_ailurus(make_network("Wan"), **SETTINGS), sample("Wan")
    with pytest.raises(AiluRusError, match=r"\(3, 4, 6\), got \(4, 6\)"):
        predict(network, "Wan", x, attention_kwargs={"grid": (4, 6)})


@pytest.mark.parametrize("scope", ["blocks", "attention"])
def test_wan_pipeline(scope):
    pipe = make_transformer_pipeline("Wan")
    two = {"prompt_embeds": text(2), "negative_prompt_embeds": text(2, 9)}
    run = lambda: generate_with_guidance(pipe, **two)  # noqa: E731
    plain = run()
    apply_ailurus(pipe, **SETTINGS, scope=scope, refresh_every=2)
    reduced = run()
    assert (reduced - plain).abs().max() > 1e-3 and torch.equal(run(), reduced)
    location, clusters = ailurus_status(pipe).locations[0], ailurus_status(pipe).last_clusters
    assert (location.num_tokens, location.num_clusters, location.clusterings) == (72, 18, 4)
    # Two videos, and not the halves of one: guidance calls twice.
    assert not torch.equal(clusters.assignment[0], clusters.assignment[1])
    assert torch.equal((remove_ailurus(pipe), run())[1], plain)
