"""ControlVideo's speed benchmark runs and undoes every contender, its numbers agree; VidToMe follows its paper."""

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusion_models import UNET, UP
from traces import traces

from ailurus_hf import ailurus_status, apply_ailurus
from benchmarks import harness
from benchmarks.peers.vidtome import VidToMeProcessor, replaced
from benchmarks.video import controlvideo_speed as speed

WIDTHS = {"attention_head_dim": 2}
NETWORKS = {
    "unet": {**UNET, **UP, **WIDTHS},
    "controlnet": {n: f for n, f in UNET.items() if n != "sample_size"}
    | {"conditioning_embedding_out_channels": (4, 8, 8, 8), **WIDTHS},
}


def test_every_method_takes_its_turn_and_is_undone():
    pipe = speed.make_pipeline(torch.device("cpu"), **NETWORKS)
    before = [traces(part) for part in (pipe.unet, pipe.controlnet)]
    attributes, classes = set(vars(pipe)), [type(m) for m in pipe.unet.modules()]
    plain, *rows = speed.measure(pipe, 2, 256, list(speed.METHODS), 1)
    assert [traces(part) for part in (pipe.unet, pipe.controlnet)] == before
    assert set(vars(pipe)) == attributes and [type(m) for m in pipe.unet.modules()] == classes
    assert plain["method"] == "plain" and plain["speed_up"] == 1 and plain["cosine"] == pytest.approx(1)
    assert [row["method"] for row in rows] == list(speed.METHODS)[1:]
    for row in rows:
        assert row["cosine"] < 0.9999999, row["method"]
        assert ("ideal" in row) == row["method"].startswith(("each", "joint"))
        if "ideal" in row:
            assert row["ideal"] > 1 and row["share_of_ideal"] == pytest.approx(row["speed_up"] / row["ideal"])
    ideal = {row["method"]: row.get("ideal") for row in rows}
    assert ideal["each 0.125"] > ideal["each 0.25"] == ideal["joint 0.25"] > ideal["each 0.25, attention"]


@pytest.mark.parametrize("fields", [{}, {"projections": "merged"}, {"scope": "attention"}], ids=str)
def test_ideal_is_what_torch_counts(fields):
    """But for the clustering, whose products of rows torch does not count."""
    pipe = speed.make_pipeline(torch.device("cpu"), **NETWORKS)
    given = speed.inputs(pipe, 2, 256, 0)
    full = harness.model_flops(lambda: speed.step_of(pipe, given))
    apply_ailurus(pipe, keep_ratio=0.25, min_tokens=256, **fields)
    speed.step_of(pipe, given)
    reduced = harness.model_flops(lambda: speed.step_of(pipe, given))
    saved = 4 * ailurus_status(pipe).saved_flops
    assert reduced == pytest.approx(full - saved)


def test_flops_are_counted_on_shapes_alone():
    methods = ["plain", "VidToMe", "joint 0.25"]
    rows = speed.counted_flops(2, 256, methods, **NETWORKS)
    assert [row["method"] for row in rows] == methods
    plain, *others = (row["share_of_flops"] for row in rows)
    assert plain == 1 and all(0 < share < 0.9 for share in others)
    assert all(0 < row["peak_mib"] < 100 for row in rows)
    pipe = speed.make_pipeline(torch.device("cpu"), **NETWORKS)
    given = speed.inputs(pipe, 2, 256, 0)
    assert harness.model_flops(lambda: speed.step_of(pipe, given)) == pytest.approx(1e12 * rows[0]["tflops"])


def test_memory_by_shapes():
    def run():
        first = torch.empty(2**20, device="meta")
        second = (first + 1) * 2  # three at once
        del first
        query = second.view(1, 1, 2**15, 32)
        return torch.nn.functional.scaled_dot_product_attention(query, query, query)  # two again, and no scores

    assert harness.peak_on_shapes(run) == 3 * 4 * 2**20


def test_a_whole_video():
    vae = {**speed.VAE, "block_out_channels": (8,) * 4, "norm_num_groups": 4}
    pipe = speed.make_pipeline(torch.device("cpu"), **NETWORKS, vae=vae)
    for method in ("plain", "VidToMe"):
        off = speed.METHODS[method](pipe, 3, 64)
        frames = speed.video_of(pipe, speed.inputs(pipe, 3, 64, 0), steps=2)
        off()
        assert frames.shape == (3, 3, 64, 64) and frames.isfinite().all()


def test_vidtome_replaces_the_most_alike_by_the_one_they_are_like():
    torch.manual_seed(0)
    source, target = torch.randn(2, 10, 4), torch.randn(2, 6, 4)
    left, index = replaced(source, target, 0.7)
    assert left.shape == (2, 3) and index.shape == (2, 10)
    for image in range(2):
        alike = torch.cosine_similarity(source[image, :, None], target[image], dim=-1)
        best, match = alike.max(-1)
        assert sorted(left[image].tolist()) == sorted(best.argsort()[:3].tolist())
        for token in range(10):
            in_left = (left[image] == token).nonzero()
            assert index[image, token] == (in_left.item() if len(in_left) else 3 + match[token])


@torch.no_grad()
def test_vidtome_joins_frames_and_replaces_alike_tokens():
    torch.manual_seed(0)
    attn, tokens = Attention(16, heads=2, dim_head=8), torch.randn(2 * 5, 12, 16)
    with torch.no_grad():
        attn.to_q.weight.mul_(8)
        attn.to_k.weight.mul_(8)
    plain = AttnProcessor2_0()
    # Nothing merged: one chunk is attention over its frames; the next one's sequence holds those before, too.
    whole = VidToMeProcessor(5, 12, chunk=5, local_ratio=0, global_ratio=0)(attn, tokens)
    want = plain(attn, tokens.view(2, 60, 16)).view_as(tokens)
    torch.testing.assert_close(whole, want, rtol=1e-4, atol=1e-5)
    two = VidToMeProcessor(5, 12, chunk=3, local_ratio=0, global_ratio=0)(attn, tokens)
    first, second = tokens.view(2, 5, 12, 16).split(3, 1)
    torch.testing.assert_close(
        two.view(2, 5, 12, 16)[:, :3].flatten(1, 2), plain(attn, first.flatten(1, 2)), rtol=1e-4, atol=1e-5
    )
    known = torch.cat([second.flatten(1, 2), first.flatten(1, 2)], 1)
    torch.testing.assert_close(
        two.view(2, 5, 12, 16)[:, 3:].flatten(1, 2), plain(attn, known)[:, :24], rtol=1e-4, atol=1e-5
    )
    # Frames alike: all but the target go, and take what its tokens get.
    still = tokens[:1].repeat(5, 1, 1)
    got = VidToMeProcessor(5, 12, chunk=5, local_ratio=1)(attn, still)
    torch.testing.assert_close(got, plain(attn, still), rtol=1e-4, atol=1e-5)
    # At small grids nothing is merged.
    small = VidToMeProcessor(5, 96 * 4, chunk=5, local_ratio=1)(attn, tokens)
    torch.testing.assert_close(small, want, rtol=1e-4, atol=1e-5)
    assert (VidToMeProcessor(5, 12)(attn, tokens) - want).abs().max() > 1e-2
