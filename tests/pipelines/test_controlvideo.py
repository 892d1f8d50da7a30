"""ControlVideoPipeline: what it makes, what diffusers' pipelines can do, long videos, and errors."""

import PIL.Image
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from traces import traces
from video_models import LATENTS, SETTINGS, SIZE, F, clip, close, differ, make_controls, make_pipeline, noise, video

from ailurus_hf import AiluRusError, apply_ailurus, remove_ailurus
from ailurus_hf.diffusion.apply import reducers_of
from ailurus_hf.pipelines import ControlVideoPipeline
from ailurus_hf.pipelines.controlvideo.key_frames import parts_of


def as_image_pipeline(pipe):
    made = StableDiffusionControlNetPipeline(
        **pipe.components, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    made.set_progress_bar_config(disable=True)
    return made


def test_one_frame_is_the_image_of_diffusers_own_pipeline():
    pipe, frame = make_pipeline(), clip(1)
    for guidance in (4.0, 1.0):
        want = as_image_pipeline(pipe)(
            "a cat", frame, negative_prompt="a dog", num_inference_steps=3, guidance_scale=guidance,
            generator=torch.Generator().manual_seed(0), output_type="latent",
        ).images  # fmt: skip
        close(video(pipe, frame, negative_prompt="a dog", guidance_scale=guidance), want, 1e-5)


def test_frames_alike_make_a_still_video():
    pipe, frame = make_pipeline(), clip(1)
    want = video(pipe, frame)
    for cross_frame in ("full", "sparse_causal", "first"):
        close(video(pipe, frame.repeat(F, 1, 1, 1), cross_frame=cross_frame), want.repeat(F, 1, 1, 1))
    # Only the condition sets frames apart.
    made = video(pipe)
    assert differ(made[0], made[1])


def test_same_seed_same_video_and_nothing_is_left_behind():
    pipe = make_pipeline()
    before = [traces(part) for part in (pipe.unet, pipe.controlnet)]
    made = video(pipe)
    assert made.shape == (F, *LATENTS) and torch.equal(video(pipe), made) and differ(video(pipe, seed=1), made)
    with pytest.raises(RuntimeError, match="enough"):
        video(pipe, callback_on_step_end=stop)
    assert [traces(part) for part in (pipe.unet, pipe.controlnet)] == before
    assert torch.equal(video(pipe), made)


def stop(*_):
    raise RuntimeError("enough")


def test_every_option_does_something():
    pipe = make_pipeline()
    plain = video(pipe, latents=noise())
    others = [
        {"cross_frame": "sparse_causal"},
        {"cross_frame": "first"},
        {"shared_group_norm": False},
        {"guidance_scale": 1.0},
        {"negative_prompt": "a dog"},
        {"controlnet_conditioning_scale": 0.2},
        {"latents": noise(1)},
        {"smooth_steps": [1]},
        {"clip_length": 3},
    ]
    made = [video(pipe, **{"latents": noise(), **other}) for other in others]
    for one, options in zip(made, others, strict=True):
        assert one.isfinite().all() and differ(one, plain), options
    assert differ(made[0], made[1])
    for chunk in (1, 3, 4, 99):
        for part in (plain, made[0]):
            cross_frame = "full" if part is plain else "sparse_causal"
            close(video(pipe, latents=noise(), attention_chunk=chunk, cross_frame=cross_frame), part, 1e-4)


def test_whose_keys_a_frame_takes():
    """A change in the last frame reaches the first only through full attention, where norms are not shared."""
    pipe, other = make_pipeline(), noise()
    other[-1] += 1
    reached = {}
    for cross_frame in ("full", "sparse_causal", "first"):
        options = {"cross_frame": cross_frame, "shared_group_norm": False}
        changed = video(pipe, latents=other, **options) - video(pipe, latents=noise(), **options)
        reached[cross_frame] = [bool(frame.abs().max() > 1e-4) for frame in changed]
    assert reached == {"full": [True] * 4, "sparse_causal": [False] * 3 + [True], "first": [False] * 3 + [True]}
    options = {"cross_frame": "first", "shared_group_norm": True}
    assert differ(video(pipe, latents=other, **options)[0], video(pipe, latents=noise(), **options)[0])


@pytest.mark.parametrize("size", [(18, 26), (10, 34), (24, 12)])
@pytest.mark.parametrize("frames", ["each", "joint"])
def test_sizes(size, frames):
    pipe = make_pipeline()
    plain = video(pipe, clip(size=size))
    assert plain.shape[-2:] == (size[0] // 2, size[1] // 2)
    reduced = video(apply_ailurus(pipe, **SETTINGS, frames=frames), clip(size=size))
    assert reduced.shape == plain.shape and reduced.isfinite().all() and differ(reduced, plain)
    # Sides that are no multiple of the VAE's factor are rounded down; others can be asked for.
    odd = clip(size=(size[0] + 1, size[1] + 1))
    assert video(pipe, odd).shape == plain.shape
    assert video(pipe, odd, height=16, width=20).shape[-2:] == (8, 10)


def test_what_comes_out():
    pipe, frames = make_pipeline(), clip()
    pictures = [
        PIL.Image.fromarray((frame.permute(1, 2, 0) * 255).round().byte().numpy())
        for frame in (frames * 255).round() / 255
    ]
    arguments = {"num_inference_steps": 2, "guidance_scale": 4.0}

    def run(frames, **given):
        return pipe("a cat", frames, generator=torch.Generator().manual_seed(0), **arguments, **given)

    tensor = run(pictures, output_type="pt").frames
    assert tensor.shape == (F, 3, *SIZE) and 0 <= tensor.min() < tensor.max() <= 1
    close(run((frames * 255).round() / 255, output_type="pt").frames, tensor)
    array = run(pictures, output_type="np").frames
    assert array.shape == (F, *SIZE, 3) and abs(array.transpose(0, 3, 1, 2) - tensor.numpy()).max() < 1e-6
    images = run(pictures).frames
    assert [image.size for image in images] == [SIZE[::-1]] * F
    (latents,) = run(pictures, output_type="latent", return_dict=False)
    decoded = torch.cat([pipe.vae.decode(x[None] / pipe.vae.config.scaling_factor).sample for x in latents])
    close((decoded / 2 + 0.5).clamp(0, 1), tensor)


def test_saved_reloaded_and_made_from_other_pipelines(tmp_path):
    pipe = make_pipeline()
    want = video(pipe)
    pipe.save_pretrained(tmp_path / "own")
    image = as_image_pipeline(pipe)
    image.save_pretrained(tmp_path / "image")
    text_to_image = StableDiffusionPipeline(
        **{n: p for n, p in pipe.components.items() if n != "controlnet"},
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    made = {
        "reloaded": ControlVideoPipeline.from_pretrained(tmp_path / "own"),
        "of an image pipeline": ControlVideoPipeline.from_pretrained(tmp_path / "image"),
        "from_pipe": ControlVideoPipeline.from_pipe(image),
        "from_pipe with a ControlNet": ControlVideoPipeline.from_pipe(text_to_image, controlnet=pipe.controlnet),
    }
    for name, other in made.items():
        other.set_progress_bar_config(disable=True)
        assert torch.equal(video(other), want), name
    back = StableDiffusionControlNetPipeline.from_pipe(
        pipe, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    assert back.unet is pipe.unet


def test_loads_as_a_custom_pipeline(tmp_path, monkeypatch):
    import diffusers.utils.dynamic_modules_utils as dynamic

    import ailurus_hf.pipelines.controlvideo.pipeline as source

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path / "own")
    other = DiffusionPipeline.from_pretrained(tmp_path / "own", custom_pipeline=source.__file__, trust_remote_code=True)
    assert type(other).__name__ == "ControlVideoPipeline" and type(other) is not ControlVideoPipeline
    other.set_progress_bar_config(disable=True)
    assert torch.equal(video(other), video(pipe))
    assert differ(video(apply_ailurus(other, **SETTINGS)), video(pipe))


def test_several_controlnets(tmp_path):
    pipe, (one, two) = make_pipeline(make_controls(2)), (clip(), clip(seed=4))
    both = video(pipe, [one, two])
    assert differ(both, video(pipe, [two, one]))
    # Without weight, the second one is not there.
    single = video(make_pipeline(pipe.controlnet.nets[0]), one, controlnet_conditioning_scale=0.5)
    close(video(pipe, [one, two], controlnet_conditioning_scale=[0.5, 0.0]), single, 1e-4)
    pipe.save_pretrained(tmp_path)
    again = ControlVideoPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(video(again, [one, two]), both)
    listed = ControlVideoPipeline(**{**pipe.components, "controlnet": list(pipe.controlnet.nets)})
    listed.set_progress_bar_config(disable=True)
    assert torch.equal(video(listed, [one, two]), both)
    apply_ailurus(pipe, **SETTINGS)
    assert len(reducers_of(pipe)) == 3 and differ(video(pipe, [one, two]), both)
    assert torch.equal(video(remove_ailurus(pipe), [one, two]), both)


@pytest.mark.parametrize("reduced", [False, True])
def test_offloaded(reduced):
    want = make_pipeline()
    pipe = make_pipeline()
    if reduced:
        apply_ailurus(want, **SETTINGS)
        apply_ailurus(pipe, **SETTINGS)
    pipe.enable_model_cpu_offload(device="cpu")
    for options in ({}, {"smooth_steps": [1]}, {"output_type": "pt"}):
        close(video(pipe, **options), video(want, **options), 1e-5)


def test_callbacks_and_progress():
    pipe, seen = make_pipeline(), []
    plain = video(pipe)

    def look(pipeline, step, timestep, tensors):
        assert pipeline is pipe
        seen.append((step, int(timestep), sorted(tensors)))
        return {}

    names = ["latents", "prompt_embeds"]
    assert torch.equal(video(pipe, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names), plain)
    assert seen == [(step, int(pipe.scheduler.timesteps[step]), names) for step in range(3)]
    doubled = video(pipe, callback_on_step_end=lambda p, step, t, tensors: {"latents": 2 * tensors["latents"]})
    assert differ(doubled, plain)

    def interrupt(pipeline, step, timestep, tensors):
        pipeline._interrupt = step == 0

    first = []
    keep = lambda p, step, t, tensors: first.append(tensors["latents"])  # noqa: E731
    video(pipe, callback_on_step_end=keep)
    assert torch.equal(video(pipe, callback_on_step_end=interrupt), first[0])
    assert torch.equal(video(pipe), plain)


def test_half_precision():
    exact = video(make_pipeline(), latents=noise())
    for frames in (None, "each", "joint"):
        pipe = make_pipeline().to(torch.bfloat16)
        if frames:
            apply_ailurus(pipe, **SETTINGS, frames=frames)
        half = video(pipe, latents=noise(), smooth_steps=[0])
        assert half.dtype == torch.bfloat16 and half.isfinite().all()
        if frames is None:
            assert torch.cosine_similarity(video(pipe, latents=noise()).float().flatten(), exact.flatten(), 0) > 0.98


@pytest.mark.parametrize("kind, fields", [(PNDMScheduler, {"skip_prk_steps": True}), (LCMScheduler, {})])
def test_other_schedulers(kind, fields):
    pipe = make_pipeline()
    plain = video(pipe)
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **fields)
    made = video(pipe)
    assert made.isfinite().all() and differ(made, plain) and torch.equal(video(pipe), made)
    with pytest.raises(AiluRusError, match=f"DDIMScheduler, got {kind.__name__}"):
        video(pipe, smooth_steps=[1])


# Long videos


def test_key_frames_and_the_clips_between_them():
    numbers = lambda *given: [(part.frames.numbers, part.kept) for part in parts_of(*given)]  # noqa: E731
    assert numbers(4, "full", None) == numbers(4, "full", 4) == [((0, 1, 2, 3), [0, 1, 2, 3])]
    keys, *clips = numbers(10, "full", 4)
    assert keys == ((0, 3, 6, 9), [0, 1, 2, 3])
    assert clips == [((0, 3, 1, 2), [2, 3]), ((3, 6, 4, 5), [2, 3]), ((6, 9, 7, 8), [2, 3])]
    # The last clip may be shorter; two key frames side by side have none between them.
    assert numbers(6, "full", 3) == [((0, 2, 4, 5), [0, 1, 2, 3]), ((0, 2, 1), [2]), ((2, 4, 3), [2])]
    for count in range(1, 30):
        for length in (3, 4, 7):
            kept = [part.frames.numbers[index] for part in parts_of(count, "full", length) for index in part.kept]
            assert sorted(kept) == list(range(count))
            assert all(
                set(row) == {0, 1} for part in parts_of(count, "full", length)[1:] for row in part.frames.sources
            )


def test_a_clip_depends_on_its_key_frames_and_on_no_other():
    pipe, start = make_pipeline(), noise(9)
    options = {"frames": clip(9), "clip_length": 5, "shared_group_norm": False, "num_inference_steps": 2}
    plain = video(pipe, latents=start, **options)

    def reached(frame):
        changed = start.clone()
        changed[frame] += 1
        moved = (video(pipe, latents=changed, **options) - plain).flatten(1).abs().amax(1)
        return [number for number in range(9) if moved[number] > 1e-4]

    assert reached(2) == [2]
    assert reached(4) == list(range(9))
    assert reached(8) == [0, 4, 5, 6, 7, 8] or reached(8) == list(range(9))


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"frames": []}, "at least 1 frame, got 0"),
        ({"frames": torch.rand(4, 1, 16, 24)}, r"\(4, 1, 16, 24\)"),
        ({"frames": torch.zeros(4, 3, 16, 24, dtype=torch.uint8)}, "uint8"),
        ({"frames": clip() * 255}, r"\[0, 1\], got .* to 255"),
        ({"frames": [PIL.Image.new("RGB", (24, 16)), PIL.Image.new("RGB", (16, 24))]}, "one size"),
        ({"frames": [[1, 2], [3, 4]]}, "PIL images .* got list"),
        ({"height": 15}, "multiple of 2, got 15: use 14"),
        ({"latents": torch.zeros(3, *LATENTS)}, r"\(4, 4, 8, 12\), got \(3, 4, 8, 12\)"),
        ({"controlnet_conditioning_scale": [1.0, 1.0]}, "1 numbers, got 2"),
        ({"output_type": "gif"}, "'latent', got 'gif'"),
        ({"cross_frame": "own"}, "'full', 'sparse_causal', 'first', got 'own'"),
        ({"clip_length": 2}, "at least 3.*got 2"),
        ({"attention_chunk": 0}, "at least 1, got 0"),
        ({"smooth_steps": [1, 3]}, r"0 to 2, got \[3\]"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
        ({"prompt_embeds": torch.zeros(1, 5, 16)}, "exactly one"),
    ],
)
def test_what_does_not_fit_is_named(arguments, named):
    with pytest.raises(AiluRusError, match=named):
        video(make_pipeline(), **arguments)


def test_several_controlnets_need_as_many_clips():
    pipe = make_pipeline(make_controls(2))
    with pytest.raises(AiluRusError, match=r"2 ControlNets .* got 3"):
        video(pipe, [clip()] * 3)
    with pytest.raises(AiluRusError, match="as many and as large"):
        video(pipe, [clip(), clip(3)])
    with pytest.raises(AiluRusError, match="one string"):
        make_pipeline()(["a", "b"], clip())
