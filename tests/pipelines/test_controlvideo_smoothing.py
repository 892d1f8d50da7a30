"""The smoother of ControlVideoPipeline: which frames it replaces, by what, and what it keeps."""

import sys

import pytest
import torch
from video_models import SIZE, clip, close, differ, make_pipeline, noise, video

from ailurus_hf import AiluRusError
from ailurus_hf.pipelines.controlvideo.smoothing import interleaved, smoothed
from ailurus_hf.video import FlowInterpolator

# The smoother


def test_every_second_frame_is_made_of_its_neighbors():
    assert interleaved(7, 0) == [1, 3, 5] and interleaved(7, 1) == [2, 4]
    assert interleaved(6, 0) == [1, 3] and interleaved(6, 1) == [2, 4]
    assert interleaved(2, 0) == [] and interleaved(3, 1) == []
    clean, asked = torch.randn(7, 4, 3, 5), []

    def between(before, after):
        asked.append((before, after))
        return 0.25 * before + 0.75 * after

    for step in (0, 1):
        got = smoothed(clean.sigmoid().logit(), step, between, torch.sigmoid, torch.logit)
        for frame in range(7):
            want = clean[frame]
            if frame in interleaved(7, step):
                want = (0.25 * clean[frame - 1].sigmoid() + 0.75 * clean[frame + 1].sigmoid()).logit()
            close(got[frame], want, 1e-4)
        assert asked[step][0].shape[0] == len(interleaved(7, step))
    with pytest.raises(AiluRusError, match=r"\(3, 4, 3, 5\), got \(2, 4, 3, 5\)"):
        smoothed(clean, 0, lambda before, after: before[:2], torch.sigmoid, torch.logit)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_smoothing_changes_what_a_step_predicts_and_keeps_its_noise(step):
    """Against DDIM's own equation: with x0 replaced, and the noise of the unsmoothed step."""
    pipe, seen = make_pipeline(), {}
    keep = lambda name: lambda p, number, t, tensors: seen.__setitem__((name, number), tensors["latents"])  # noqa: E731
    video(pipe, latents=noise(5), frames=clip(5), callback_on_step_end=keep("plain"))
    inner = pipe.scheduler.step
    pipe.scheduler.step = lambda *a, **k: [seen.__setitem__(int(a[1]), inner(*a, **k)), seen[int(a[1])]][1]
    mean = {"interpolator": lambda before, after: (before + after) / 2}
    video(pipe, latents=noise(5), frames=clip(5), smooth_steps=[step], callback_on_step_end=keep("smooth"), **mean)
    timesteps = [int(t) for t in pipe.scheduler.timesteps]
    clean = seen[timesteps[step]].pred_original_sample
    alpha = pipe.scheduler.alphas_cumprod[timesteps[step + 1]] if step < 2 else torch.tensor(1.0)
    unsmoothed, smooth = seen["plain", step], seen["smooth", step]
    rest = unsmoothed - alpha.sqrt() * clean  # noise, by its weight
    predicted = (smooth - rest) / alpha.sqrt()
    with torch.no_grad():
        pictures = (pipe.vae.decode(clean / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    for frame in range(5):
        want = clean[frame]
        if frame in interleaved(5, step):
            mean = (pictures[frame - 1] + pictures[frame + 1])[None] / 2
            with torch.no_grad():
                want = pipe.vae.encode(2 * mean - 1).latent_dist.mode()[0] * pipe.vae.config.scaling_factor
            assert differ(want, clean[frame])
        close(predicted[frame], want, 1e-2)


def test_the_given_interpolator_is_asked():
    pipe, asked = make_pipeline(), []

    def nearest(before, after):
        asked.append((before.shape, before.dtype, float(before.min()), float(before.max())))
        return before

    made = video(pipe, smooth_steps=[0, 1], interpolator=nearest)
    assert differ(made, video(pipe, smooth_steps=[0, 1]))
    assert [shape for shape, *_ in asked] == [(1, 3, *SIZE), (1, 3, *SIZE)]
    assert all(kind == torch.float32 and 0 <= low < high <= 1 for _, kind, low, high in asked)


def test_optical_flow_is_the_default_and_needs_opencv(monkeypatch):
    pipe = make_pipeline()
    assert torch.equal(video(pipe, smooth_steps=[1]), video(pipe, smooth_steps=[1], interpolator=FlowInterpolator()))
    monkeypatch.setitem(sys.modules, "cv2", None)
    plain = video(pipe)
    steps = []
    with pytest.raises(AiluRusError, match=r'cv2 cannot be imported .*: pip install "ailurus-hf\[video\]"'):
        video(pipe, smooth_steps=[1], callback_on_step_end=lambda *given: steps.append(given) or {})
    assert not steps and torch.equal(video(pipe), plain)
