"""AiluRus in ControlVideoPipeline: on and off, joint clusters of frames, steps, and the parts of long videos."""

from collections import defaultdict

import pytest
import torch
from traces import traces
from video_models import SETTINGS, F, clip, close, differ, make_controls, make_pipeline, noise, video

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
    by_network = {n: {p.clusterings for p in rows if p.where.startswith(n)} for n in ("unet", "controlnet")}
    assert by_network == {"unet": {5 * 2 * 2}, "controlnet": {5 * 2 * 2}}


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


# Full steps, each test in these ways

FULL = {
    "each, extrapolated": {"full_every": 2, "extrapolate": True},
    "joint, merged projections": {"full_every": 2, "frames": "joint", "projections": "merged"},
}
on_full_steps = pytest.mark.parametrize("way", FULL.values(), ids=FULL)
BUILT = {**FULL, "inner layers": {"inner_every": 2, "unreduced_first_steps": 1, "extrapolate": True}}
on_steps_that_build_on_others = pytest.mark.parametrize("way", BUILT.values(), ids=BUILT)
# Key frames 0, 2 and 4: as many as either clip has frames.
LONG = {"frames": clip(5), "num_inference_steps": 4, "clip_length": 3}


@pytest.mark.parametrize("frames", ["each", "joint"])
def test_every_second_step_on_all_tokens(frames):
    pipe = make_pipeline()
    options = {**LONG, "latents": noise(5)}
    plain = video(pipe, **options)
    off = lambda **fields: (video(apply_ailurus(pipe, **SETTINGS, frames=frames, **fields), **options) - plain).norm()  # noqa: E731
    without = off()
    assert off(full_every=2) < without
    made = video(pipe, **options)
    assert torch.equal(video(pipe, **options), made) and made.isfinite().all()
    rows = [p for p in ailurus_status(pipe).locations if p.num_tokens == 96]
    # Three videos of key frames and two clips, in two of four steps.
    assert {p.clusterings for p in rows if p.where.endswith("down_blocks.0.attentions.0")} == {3 * 3 * 2}
    assert torch.equal(video(remove_ailurus(pipe), **options), plain)


@on_steps_that_build_on_others
@pytest.mark.parametrize("changed", [1, 3], ids=["first clip", "last clip"])
def test_clips_of_a_long_video_know_nothing_of_one_another(way, changed):
    pipe = apply_ailurus(make_pipeline(), **SETTINGS, **way)
    other = noise(5)
    other[changed] = -other[changed]
    one, two = (video(pipe, **LONG, latents=start) for start in (noise(5), other))
    assert [n for n in range(5) if not torch.equal(one[n], two[n])] == [changed]


@on_steps_that_build_on_others
def test_a_video_leaves_nothing_for_the_next_of_other_frames(way):
    pipe, options = apply_ailurus(make_pipeline(), **SETTINGS, **way), {"num_inference_steps": 4}
    want = video(pipe, latents=noise(), **options)
    video(pipe, **LONG, latents=noise(5))
    video(pipe, latents=noise(2), frames=clip(2), **options)
    video(pipe, latents=noise(), guidance_scale=1.0, **options)
    # One that is broken off between a full step and the next.
    stop = lambda pipe, step, *_: setattr(pipe, "_interrupt", step == 2) or {}  # noqa: E731
    video(pipe, latents=noise(seed=6), callback_on_step_end=stop, **options)
    assert torch.equal(video(pipe, latents=noise(), **options), want)
    clocks = [reducer.clock for _, reducer in reducers_of(pipe)]
    assert len(clocks) == 2 and not any(clock._generations.get().kept for clock in clocks)


@on_full_steps
@pytest.mark.parametrize("long", [False, True], ids=["all frames", "key frames"])
def test_identity_where_every_step_is_full_or_every_token_kept(way, long):
    pipe = make_pipeline()
    options = {**LONG, "latents": noise(5)} if long else {"latents": noise(), "num_inference_steps": 4}
    plain, before = video(pipe, **options), [traces(part) for part in (pipe.unet, pipe.controlnet)]
    for fields in ({"full_every": 1, "extrapolate": False}, {"keep_ratio": 1.0}):
        apply_ailurus(pipe, **{**SETTINGS, **way, **fields})
        close(video(pipe, **options), plain, 1e-4)
    apply_ailurus(pipe, **SETTINGS, **way)
    assert differ(video(pipe, **options), plain)
    assert torch.equal(video(remove_ailurus(pipe), **options), plain)
    assert [traces(part) for part in (pipe.unet, pipe.controlnet)] == before


@on_full_steps
@pytest.mark.parametrize("controls, parts", [(1, 1), (2, 1), (1, 3)], ids=["one", "two", "key frames and clips"])
def test_unet_and_controlnets_run_on_representatives_between_full_steps(way, controls, parts):
    pipe = apply_ailurus(make_pipeline(make_controls(controls) if controls > 1 else None), **SETTINGS, **way)
    rows = defaultdict(list)
    for name, reducer in reducers_of(pipe):
        feed = reducer.stacks[0].blocks[0].ff
        feed.register_forward_pre_hook(lambda _, args, name=name: rows[name].append(args[0].shape[1]))
    shown = [clip(5)] * controls if controls > 1 else clip(5)
    video(pipe, **{**LONG, "frames": shown, "clip_length": 3 if parts > 1 else None}, latents=noise(5))
    # In a full step representatives run, too. Each part has full steps of its own.
    assert len(rows) == 1 + controls
    assert all(seen == 2 * (parts * [96, 24] + parts * [24]) for seen in rows.values())


@on_full_steps
def test_full_steps_and_the_smoother(way):
    pipe = make_pipeline()
    options = {"latents": noise(), "num_inference_steps": 4, "smooth_steps": (0, 1), "output_type": "pt"}
    plain = video(pipe, **options)
    apply_ailurus(pipe, **{**SETTINGS, **way, "keep_ratio": 1.0})
    close(video(pipe, **options), plain)
    apply_ailurus(pipe, **SETTINGS, **way)
    made = video(pipe, **options)
    assert made.isfinite().all() and differ(made, plain)
    assert differ(video(pipe, **{**options, "smooth_steps": ()}), made)
    assert torch.equal(video(pipe, **options), made)
    assert torch.equal(video(remove_ailurus(pipe), **options), plain)
