"""`ailurus-hf video`, end to end on tiny networks: the clip that comes out, the comparison, and what is refused."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from video_clips import moving_square, save_pipeline

from ailurus_hf import AiluRusDiffusionConfig, config, video
from ailurus_hf.cli import build_parser, main, video_sampling
from ailurus_hf.cli import video as cli_video
from ailurus_hf.pipelines import ControlVideoPipeline
from ailurus_hf.video import open_clip, psnr, write_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("video")
    save_pipeline(folder)
    write_video(folder / "square.mp4", moving_square(12), fps=12)
    write_video(folder / "pictures", moving_square(4))
    (folder / "text.mp4").write_text("no video")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(autouse=True)
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


MODEL = ["video", "--prompt", "a square", "--model", "model", "--controlnet", "controlnet", "--height", "32"]
REDUCED = ["--ailurus-min-tokens", "16", "--ailurus-keep-ratio", "0.25"]
RUN = [*MODEL, "--video", "square.mp4", "--steps", "2", *REDUCED]
SHORT = [*RUN, "--frames", "3"]


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main([*arguments, "--json"]) == 0
    streams = capsys.readouterr()
    assert streams.err == ""  # no bar where nobody watches, and no library speaks
    return json.loads(streams.out)


def test_settings_of_a_file_some_replaced(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    AiluRusDiffusionConfig(keep_ratio=0.5, min_tokens=16, refresh_every=2).save(tmp_path / "settings.json")
    rest = ["--config", str(tmp_path / "settings.json"), "--output", str(tmp_path / "out.mp4"), "--frames", "3"]
    call = [*MODEL, "--video", "square.mp4", "--steps", "2"]
    location = run_json(capsys, *call, *rest, "--keep-ratio", "0.25")["ailurus"]["locations"][0]
    assert location["num_clusters"] * 4 == location["num_tokens"]
    assert main([*call, *rest, "--overwrite", "--preset", "fast"]) == 2
    assert "--config and --preset" in capsys.readouterr().err
    assert main([*call, "--config", "text.mp4", "--output", str(tmp_path / "other.mp4")]) == 2


def test_a_clip_goes_in_and_a_video_comes_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = run_json(capsys, *RUN, "--output", str(tmp_path / "out.mp4"))
    clip = open_clip(tmp_path / "out.mp4")
    frames = list(clip)
    assert (len(frames), clip.size, clip.fps) == (12, (48, 32), 12)
    assert (found["frames"], found["size"], found["fps"]) == (12, [48, 32], 12)
    assert all(np.asarray(frame).std() > 5 for frame in frames)
    reduced = [
        location for location in found["ailurus"]["locations"] if location["num_clusters"] < location["num_tokens"]
    ]
    assert {location["num_tokens"] for location in reduced} == {384, 96}
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


def test_it_is_what_the_pipeline_makes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = [
        "--no-ailurus",
        "--seed",
        "3",
        "--guidance-scale",
        "5",
        "--frames",
        "4",
        "--output",
        str(tmp_path / "out"),
    ]
    arguments = [argument for argument in RUN if argument not in REDUCED]
    assert run_json(capsys, *arguments, *options)["ailurus"] is None
    canny = video.load_condition("canny")
    controls = [canny(frame) for frame in open_clip("square.mp4", max_frames=4)]
    pipe = ControlVideoPipeline.from_pretrained("model")
    pipe.set_progress_bar_config(disable=True)
    made = pipe("a square", controls, num_inference_steps=2, guidance_scale=5, generator=torch.manual_seed(3)).frames
    written = list(open_clip(tmp_path / "out"))
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(made, written, strict=True))


def test_compare_writes_both_side_by_side(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = run_json(capsys, *SHORT, "--compare", "--output", str(tmp_path / "out"))
    assert found["comparison"] == str(tmp_path / "out_comparison")
    assert found["speedup"] == pytest.approx(found["plain_seconds"] / found["seconds"], rel=0.05)
    both, made = list(open_clip(tmp_path / "out_comparison")), list(open_clip(tmp_path / "out"))
    strip = both[0].height - 32
    plain, reduced = ([frame.crop((x, strip, x + 48, strip + 32)) for frame in both] for x in (0, 48))
    assert len(both) == 3 and both[0].width == 2 * 48
    assert psnr(reduced, made) == math.inf and psnr(plain, made) == pytest.approx(found["psnr"], abs=1e-3)
    assert 5 < found["psnr"] < 50
    assert main([*SHORT, "--compare", "--output", str(tmp_path / "out.mp4")]) == 0
    printed = capsys.readouterr().out
    assert "PSNR between the two" in printed and "384 → 96" in printed and "3 frames, 48×32, 12 fps" in printed
    assert {path.name for path in tmp_path.glob("*.mp4")} == {"out.mp4", "out_comparison.mp4"}


def test_keeping_all_tokens_compares_equal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = [*SHORT, "--ailurus-keep-ratio", "1", "--compare", "--output", str(tmp_path / "out.gif")]
    psnr = run_json(capsys, *arguments)["psnr"]
    assert psnr is None or psnr > 60  # None: not one pixel differs
    assert (tmp_path / "out_comparison.gif").is_file()


@pytest.mark.parametrize(
    ("options", "frames", "fps"),
    [
        (["--every", "3"], 4, 4),
        (["--fps", "6", "--frames", "5"], 5, 6),
        (["--smooth-steps", "0", "1", "--frames", "4"], 4, 12),
        (["--clip-length", "3", "--frames", "6"], 6, 12),
        (["--cross-frame", "first", "--attention-chunk", "1", "--frames", "3"], 3, 12),
        (["--ailurus-frames", "joint", "--frames", "3"], 3, 12),
        (["--video", "pictures"], 4, 8),
        (["--condition", "none", "--dtype", "bfloat16", "--frames", "2"], 2, 12),
    ],
)
def test_options(capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[str], frames: int, fps: int) -> None:
    found = run_json(capsys, *RUN, *options, "--output", str(tmp_path / "out.mp4"))
    clip = open_clip(tmp_path / "out.mp4")
    assert found["frames"] == len(list(clip)) == frames
    assert found["fps"] == clip.fps == fps


def test_full_steps(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    call = [*MODEL, "--video", "square.mp4", "--frames", "3", "--keep-ratio", "0.25", "--min-tokens", "16"]
    options = ["--full-every", "2", "--extrapolate", "--between", "representatives", "--steps", "4", "--compare"]
    found = run_json(capsys, *call, *options, "--output", str(tmp_path / "out.gif"))
    wanted = AiluRusDiffusionConfig(keep_ratio=0.25, min_tokens=16, full_every=2, extrapolate=True)
    assert found["ailurus"]["config"] == wanted.to_dict() and found["speedup"] > 0
    # Steps 0 and 2 and no other make clusters.
    reduced = [p for p in found["ailurus"]["locations"] if p["num_clusters"] < p["num_tokens"]]
    assert reduced and {p["clusterings"] for p in reduced} == {2}


def test_inner_layers_beside_a_preset(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    call = [*MODEL, "--video", "square.mp4", "--frames", "3", "--preset", "fast", "--min-tokens", "16"]
    options = ["--inner-every", "2", "--unreduced-first-steps", "1", "--steps", "5"]
    found = run_json(capsys, *call, *options, "--output", str(tmp_path / "out.gif"))["ailurus"]
    wanted = AiluRusDiffusionConfig.preset("fast", min_tokens=16, inner_every=2, unreduced_first_steps=1)
    assert AiluRusDiffusionConfig.from_dict(found["config"]) == wanted and wanted.extrapolate
    # All layers run in steps 0, 2 and 4.
    assert any(p["num_clusters"] and p["num_clusters"] < p["num_tokens"] for p in found["locations"])


def test_settings_reach_ailurus(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ["--ailurus-frames", "joint", "--ailurus-refresh-every", "2", "--ailurus-unreduced-first-steps", "1"]
    settings = run_json(capsys, *SHORT, *options, "--output", str(tmp_path / "out.gif"))["ailurus"]["config"]
    expected = {"keep_ratio": 0.25, "min_tokens": 16, "frames": "joint", "refresh_every": 2, "unreduced_first_steps": 1}
    assert {name: settings[name] for name in expected} == expected


def test_the_choices_are_those_of_the_library() -> None:
    assert cli_video.CONDITIONS == video.CONDITIONS
    usage = build_parser()._subparsers._group_actions[0].choices["video"].format_help()
    for choices in (config.FRAMES, config.SCOPES, config.CLUSTERINGS):
        assert "{" + ",".join(choices) + "}" in usage
    fields = config.AiluRusDiffusionConfig().to_dict()
    for name in cli_video.AILURUS_FIELDS:
        assert name in fields and f"--ailurus-{name.replace('_', '-')}" in usage


@pytest.mark.parametrize(
    ("source", "asked", "made"),
    [
        ((1920, 1080), (None, None), (912, 512)),
        ((1084, 1080), (None, None), (512, 512)),
        ((480, 640), (256, None), (192, 256)),
        ((480, 640), (None, 256), (256, 344)),
        ((480, 640), (256, 256), (256, 256)),
        ((4, 4000), (None, None), (512, 512_000)),
    ],
)
def test_the_size_keeps_the_shape_of_the_clip(source: tuple, asked: tuple, made: tuple) -> None:
    assert video_sampling.fitted_size(source, *asked, shorter=512, multiple=8) == made


def test_frames_are_cut_and_not_distorted() -> None:
    circle = Image.new("RGB", (90, 40), "black")
    circle.paste("white", (35, 10, 55, 30))  # a square in the middle
    (frame,) = video_sampling.read_frames([circle], (40, 40))
    pixels = np.asarray(frame)[..., 0] > 128
    rows, columns = np.where(pixels)
    assert np.ptp(rows) == np.ptp(columns) == 19


def interrupting(at: int) -> Callable:
    """The pipeline's call, interrupted at the n-th."""
    plain_call, calls = ControlVideoPipeline.__call__, []

    def call(self: ControlVideoPipeline, *args: object, **kwargs: object) -> object:
        calls.append(self)
        if len(calls) == at:
            raise KeyboardInterrupt
        return plain_call(self, *args, **kwargs)

    return call


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_an_interrupt_leaves_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, at: int) -> None:
    monkeypatch.setattr(ControlVideoPipeline, "__call__", interrupting(at))
    assert main([*SHORT, "--compare", "--output", str(tmp_path / "out.mp4")]) == 130
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_while_writing_leaves_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    frames = moving_square(4)

    class Interrupted(list):
        def __iter__(self):
            yield frames[0]
            raise KeyboardInterrupt

    result = type("Result", (), {"frames": Interrupted(frames)})
    monkeypatch.setattr(ControlVideoPipeline, "__call__", lambda self, *args, **kwargs: result)
    assert main([*SHORT, "--output", str(tmp_path / "out.mp4")]) == 130
    assert list(tmp_path.iterdir()) == []


def test_progress_with_time_left_where_someone_watches(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main([*SHORT, "--compare", "--output", str(tmp_path / "out.gif")]) == 0
    told = capsys.readouterr().err
    assert all(name in told for name in ("plain", "AiluRus", "0/2")) and "<" in told  # elapsed<left


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([*MODEL, "--video", "nowhere.mp4"], "no such file or folder: nowhere.mp4"),
        ([*MODEL, "--video", "text.mp4"], "text.mp4 is not a readable video"),
        ([*MODEL, "--video", "empty"], "no picture in folder empty"),
        ([*SHORT, "--frames", "13"], "too few frames: 12, but 13 are needed"),
        ([*SHORT, "--every", "6"], "too few frames: 2, but 3 are needed"),
        ([*SHORT, "--every", "2", "--fps", "5"], "give one, got every=2 and fps=5"),
        ([*SHORT, "--fps", "0"], "fps must be above 0"),
        ([*SHORT, "--frames", "0"], "'0' is not a whole number"),
        ([*SHORT, "--condition", "magic"], "magic"),
        ([*SHORT, "--condition", "depth"], 'needs controlnet_aux: pip install "ailurus-hf[video]"'),
        ([*SHORT, "--output", "out.avi"], "its suffix must be"),
        ([*SHORT, "--output", "pictures"], "new or an empty folder"),
        ([*SHORT, "--height", "33"], "height must be a multiple of 2, got 33"),
        ([*SHORT, "--model", "controlnet"], "no model_index.json"),
        ([*SHORT, "--model", "./nowhere"], "./nowhere"),
        ([*SHORT, "--controlnet", "model"], "no config.json"),
        ([*SHORT, "--device", "abacus"], "abacus"),
        ([*SHORT, "--interpolator", "text.mp4", "--smooth-steps", "1"], "text.mp4 has no weights of RIFE"),
        ([*SHORT, "--interpolator", "text.mp4"], "--interpolator is for --smooth-steps"),
        ([*SHORT, "--smooth-steps", "2"], "smooth_steps must be from 0 to 1, got [2]"),
        ([*SHORT, "--clip-length", "2"], "clip_length must be at least 3"),
        ([*SHORT, "--ailurus-keep-ratio", "1.5"], "got 1.5"),
        ([*SHORT, "--ailurus-unreduced-first-steps", "-1"], "got -1"),
        ([*SHORT, "--extrapolate"], "give full_every or inner_every"),
        ([*SHORT, "--inner-every", "2", "--full-every", "2"], "two rhythms"),
        ([*SHORT, "--between", "nothing"], "give full_every"),
        ([*SHORT, "--no-ailurus"], "--no-ailurus and --ailurus-keep-ratio"),
        ([*MODEL, "--video", "square.mp4", "--no-ailurus", "--compare"], "--no-ailurus and --compare"),
        (["video"], "required"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "controlnet_aux", None)  # as where it is not installed
    output = [] if "--output" in arguments else ["--output", str(tmp_path / "out.mp4")]
    try:
        code = main([*arguments, *output])
    except SystemExit as exit:  # argparse's own refusals
        code = exit.code
    streams = capsys.readouterr()
    assert code == 2 and told in streams.err, streams.err
    assert streams.err.count("\n") == 1 and streams.out == "", streams.err
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_gets_advice(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def call(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 TiB")

    monkeypatch.setattr(ControlVideoPipeline, "__call__", call)
    assert main([*SHORT, "--output", str(tmp_path / "out.mp4")]) == 2
    assert "3 frames of 48×32 do not fit in memory: try --attention-chunk 1" in capsys.readouterr().err


def test_a_detector_that_prints_does_not_spoil_the_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class NormalBaeDetector:
        @classmethod
        def from_pretrained(cls, source: str) -> "NormalBaeDetector":
            print("Loading base model ()...Done.")
            assert source == "my/weights"
            return cls()

        def to(self, device: object) -> "NormalBaeDetector":
            return self

        def __call__(self, picture: Image.Image, **options: object) -> Image.Image:
            return picture.resize((64, 64))

    module = ModuleType("controlnet_aux")
    module.NormalBaeDetector = NormalBaeDetector
    monkeypatch.setitem(sys.modules, "controlnet_aux", module)
    options = ["--condition", "normal", "--annotators", "my/weights", "--output", str(tmp_path / "out.gif")]
    assert run_json(capsys, *SHORT, *options)["frames"] == 3


def test_the_square_moves_in_what_the_networks_see(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Image.Image] = []

    def call(self: object, prompt: str, controls: list[Image.Image], **kwargs: object) -> object:
        seen.extend(controls)
        return type("Result", (), {"frames": controls})

    monkeypatch.setattr(ControlVideoPipeline, "__call__", call)
    assert main([*RUN, "--output", str(tmp_path / "out.mp4")]) == 0
    left = [np.where(np.asarray(edges).max((0, 2)) > 128)[0].min() for edges in seen]
    assert len(left) == 12
    assert all(1 <= after - before <= 3 for before, after in pairwise(left))


def test_the_example_makes_a_video(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "examples/controlvideo.py"
    options = ["--model", "model", "--controlnet", "controlnet", "--frames", "4", "--size", "32", "32", "--steps", "5"]
    command = [sys.executable, str(script), "square.mp4", "a square", "--output", str(tmp_path / "out.mp4"), *options]
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    clip = open_clip(tmp_path / "out.mp4")
    assert len(list(clip)) == 4 and clip.size == (32, 32) and clip.fps == 12
