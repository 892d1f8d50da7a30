"""`ailurus-hf video` and files: nothing is overwritten, lost or left half; what cannot work is told before it runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from video_clips import moving_square, save_pipeline

from ailurus_hf import AiluRusError
from ailurus_hf.cli import main, video_sampling
from ailurus_hf.cli.video_sampling import write_or_keep
from ailurus_hf.pipelines import ControlVideoPipeline
from ailurus_hf.video import check_output, open_clip, write_video

MODEL = ["video", "--prompt", "a square", "--controlnet", "controlnet", "--height", "32", "--frames", "3"]
RUN = [*MODEL, "--model", "model", "--video", "square.mp4", "--steps", "1", "--min-tokens", "16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("video_files")
    save_pipeline(folder)
    write_video(folder / "square.mp4", moving_square(4), fps=12)
    write_video(folder / "strip.gif", [Image.new("RGB", (4, 4000), (50 * n, 0, 0)) for n in range(3)])
    return folder


@pytest.fixture(autouse=True)
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ControlVideoPipeline, "__call__", lambda *_, **__: pytest.fail("frames were made"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    streams = capsys.readouterr()
    assert streams.err.count("\n") == 1 and streams.out == "", streams.err
    return streams.err


@pytest.mark.parametrize("output", ["square.mp4", "./square.mp4", "hard.mp4", "soft.mp4"])
def test_the_clip_is_not_overwritten(
    never: None, capsys: pytest.CaptureFixture[str], tmp_path: Path, output: str
) -> None:
    for name, link in (("hard.mp4", os.link), ("soft.mp4", os.symlink)):
        if not Path(name).exists():
            link(os.path.abspath("square.mp4"), name)
    before = Path("square.mp4").read_bytes()
    assert "it is the clip that the frames are made of" in refused(capsys, *RUN, "--output", output)
    shutil.copy("square.mp4", tmp_path / "out_comparison.mp4")
    arguments = [*RUN, "--compare", "--video", str(tmp_path / "out_comparison.mp4")]
    assert "it is the clip" in refused(capsys, *arguments, "--output", str(tmp_path / "out.mp4"))
    assert Path("square.mp4").read_bytes() == before == (tmp_path / "out_comparison.mp4").read_bytes()


@pytest.mark.parametrize("length", [248, 252, 300])
def test_a_long_name_is_written_or_refused_at_once(
    never: None, capsys: pytest.CaptureFixture[str], tmp_path: Path, length: int
) -> None:
    path = tmp_path / f"{'p' * (length - 4)}.mp4"
    if length < 256:
        check_output(path)
        assert write_video(path, moving_square(2)) == 2 and len(list(open_clip(path))) == 2
        arguments = [*RUN, "--compare", "--output", str(path)]  # the comparison's name is longer
    else:
        arguments = [*RUN, "--output", str(path)]
    assert "File name too long" in refused(capsys, *arguments)


def test_too_little_room_is_told_before_frames_are_made(
    never: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("ailurus_hf.video.writing.shutil.disk_usage", lambda path: usage)
    assert "0.0 MB are free" in refused(capsys, *RUN, "--output", str(tmp_path / "out.mp4"))


def test_frames_that_cannot_be_written_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("ailurus_hf.video.writing.COLORS", ["-frames:v", "2"])  # as a disk that is full after two
    frames = moving_square(12)
    with pytest.raises(AiluRusError, match=r"cannot write .*; the frames are in .*ailurus-frames-") as raised:
        write_or_keep(tmp_path / "out.mp4", frames, 8)
    kept = list(open_clip(str(raised.value).rpartition(" in ")[2]))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(kept, frames, strict=True))
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize(
    ("part", "fields", "told"),
    [
        ("unet", {"addition_embed_type": "text_time"}, "is a model like SDXL"),
        ("unet", {"in_channels": 9}, "takes 9 channels, its latents have 4"),
        ("controlnet", {"cross_attention_dim": 1024}, "it attends to text of 1024 channels, the UNet to 16"),
    ],
)
def test_parts_that_do_not_go_together(
    never: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    part: str,
    fields: dict,
    told: str,
) -> None:
    def changed(name: str, from_pretrained: object, **options: object) -> object:
        loaded = plain(name, from_pretrained, **options)
        if hasattr(loaded, part):
            getattr(loaded, part).register_to_config(**fields)
        return loaded

    plain = video_sampling.read_pretrained
    monkeypatch.setattr(video_sampling, "read_pretrained", changed)
    assert told in refused(capsys, *RUN, "--output", str(tmp_path / "out.mp4"))


def test_too_many_steps_and_a_strip(never: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = ["--output", str(tmp_path / "out.mp4")]
    assert "--steps must be at most 1000" in refused(capsys, *RUN, "--steps", "1001", *output)
    arguments = [*RUN, "--video", "strip.gif", "--height", "40000", "--width", "4000", *output]
    assert "4×4000 pixels would become 4000×40000" in refused(capsys, *arguments)


def test_what_diffusers_refuses_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def call(*args: object, **kwargs: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied\nmore")

    monkeypatch.setattr(ControlVideoPipeline, "__call__", call)
    told = refused(capsys, *RUN, "--output", str(tmp_path / "out.mp4"))
    assert "model cannot run with controlnet: mat1 and mat2 shapes" in told
    assert list(tmp_path.iterdir()) == []


SLOW = """
import sys, time
from PIL import Image
from ailurus_hf.cli import main
from ailurus_hf.pipelines import ControlVideoPipeline

class Frames(list):
    def __iter__(self):
        for number in range(1000):
            print("frame", flush=True)
            time.sleep(0.05)
            yield Image.new("RGB", (64, 64))

ControlVideoPipeline.__call__ = lambda *_, **__: type("Result", (), {"frames": Frames()})
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("name", ["out.mp4", "out.gif", "out"])
def test_sigterm_leaves_no_half_file(tmp_path: Path, name: str) -> None:
    helpers = Path(__file__).parents[1] / "helpers"
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[2]}:{helpers}"}
    command = [sys.executable, "-c", SLOW, *RUN, "--output", str(tmp_path / name)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "frame\n"
        time.sleep(0.2)
        assert list(tmp_path.iterdir())  # being written, under a hidden name
        process.send_signal(signal.SIGTERM)
        told = process.communicate()[1]
    assert process.returncode == 143 and "Traceback" not in told, told
    assert list(tmp_path.iterdir()) == []


def test_presets_reach_the_pipeline(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = [*RUN, "--preset", "fast", "--refresh-every", "3", "--output", str(tmp_path / "out.gif"), "--json"]
    assert main(arguments) == 0
    config = json.loads(capsys.readouterr().out)["ailurus"]["config"]
    assert (config["inner_every"], config["scope"], config["refresh_every"]) == (5, "attention", 3)
