"""AiluRus in ControlVideoPipeline: on and off, joint clusters of frames, steps, and the parts of long videos."""

import pytest
import torch
from traces import traces
from video_models import SETTINGS, F, clip, close, differ, make_pipeline, noise, video

from ailurus_hf import ailurus_status, apply_ailurus, remove_ailurus
from ailurus_hf.diffusion.apply import reducers_of


@pytest.mark.parametrize("frames", ["each", "joint"])
@pytest.mark.parametrize("scope", ["blocks", "attention"])
def test_every_part_of_a_long_video_has_its_own_assignment(frames, scope):
    pipe = apply_ailurus(make_pipeline(), **SETTINGS, frames=frames, scope=scope, refresh_every=2)
    options = {"frames": clip(9), "latents": noise(9), "num_inference_steps": 4}
    made = video(pipe, **options, clip_length=3)
    assert made.isfinite().all() and torch.equal(video(pipe, **options, clip_length=3), made)
    # Key frames and four clips, at every other of 4 steps, twice.
    rows = [p for p in ailurus_status(pipe).locations if p.num_tokens == 96]
    by_network = {n: sum(p.clusterings for p in rows if p.where.startswith(n)) for n in ("unet", "controlnet")}
    assert by_network == {"unet": 5 * 2 * 2, "controlnet": 5 * 2 * 2}


# AiluRus in it

WAYS = {
    "blocks": {},
    "joint": {"frames": "joint"},
    "joint, merged projections": {"frames": "joint", "projections": "merged"},
    "joint, density peaks": {"frames": "joint", "clustering": "density_peaks"},
    "attention": {"scope": "attention"},
    "joint, attention": {"frames": "joint", "scope": "attention"},
    "joint, keys and values": {"frames": "joint", "scope": "attention", "reduce": "kv"},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_ailurus_on_and_off(way, caplog):
    pipe = make_pipeline()
    plain, before = video(pipe, latents=noise()), [traces(part) for part in (pipe.unet, pipe.controlnet)]
    apply_ailurus(pipe, **SETTINGS, **way)
    reduced = video(pipe, latents=noise())
    assert differ(reduced, plain) and torch.cosine_similarity(reduced.flatten(), plain.flatten(), 0) > 0.7
    assert torch.equal(video(pipe, latents=noise()), reduced)
    rows = ailurus_status(pipe).locations
    assert {p.where.split(".")[0] for p in rows} == {"unet", "controlnet"}
    assert all(p.num_clusters == p.num_tokens // 4 and p.flops_saved > 0 for p in rows)
    assert not [r for r in caplog.records if r.name.startswith("ailurus_hf")]  # no processor is said to be lost
    for cross_frame in ("sparse_causal", "first"):
        assert differ(video(pipe, latents=noise(), cross_frame=cross_frame), reduced)
    assert torch.equal(video(remove_ailurus(pipe), latents=noise()), plain)
    assert [traces(part) for part in (pipe.unet, pipe.controlnet)] == before and not ailurus_status(pipe).active


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_ailurus_keeps_everything_at_ratio_one(way):
    pipe = make_pipeline()
    plain = video(pipe, latents=noise())
    apply_ailurus(pipe, **{**SETTINGS, **way, "keep_ratio": 1.0})
    close(video(pipe, latents=noise()), plain, 1e-4)


def test_joint_clusters_are_the_unets_alone():
    """A ControlNet sees one frame at a time: what it merges over time would leak between frames."""
    pipe = apply_ailurus(make_pipeline(), **SETTINGS, frames="joint")
    video(pipe)
    grids = {
        name.split(".")[0]: {record.last_grid for record in reducer.records.values()}
        for name, reducer in reducers_of(pipe)
    }
    assert grids == {"unet": {(F, 8, 12), (F, 4, 6)}, "controlnet": {(8, 12), (4, 6)}}
    video(pipe, cross_frame="first")
    assert {r.last_grid for r in reducers_of(pipe)[0][1].records.values()} == {(8, 12), (4, 6)}


def test_steps_are_counted_once_each():
    pipe = apply_ailurus(make_pipeline(), **SETTINGS, refresh_every=2, unreduced_first_steps=1, unreduced_last_steps=1)
    video(pipe, num_inference_steps=6)
    first = ailurus_status(pipe).locations[0]
    assert (first.forwards, first.clusterings) == (6, 2)


@pytest.mark.parametrize("frames", ["each", "joint"])
def test_every_second_step_on_all_tokens(frames):
    pipe = make_pipeline()
    options = {"frames": clip(9), "latents": noise(9), "num_inference_steps": 4, "clip_length": 3}
    plain = video(pipe, **options)
    off = lambda **fields: (video(apply_ailurus(pipe, **SETTINGS, frames=frames, **fields), **options) - plain).norm()  # noqa: E731
    without = off()
    assert off(full_every=2) < without
    made = video(pipe, **options)
    assert torch.equal(video(pipe, **options), made) and made.isfinite().all()
    rows = [p for p in ailurus_status(pipe).locations if p.num_tokens == 96]
    # Three videos of key frames and four clips, in two of four steps.
    assert {p.clusterings for p in rows if p.where.endswith("down_blocks.0.attentions.0")} == {3 * 5 * 2}
    assert torch.equal(video(remove_ailurus(pipe), **options), plain)
