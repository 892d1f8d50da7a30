"""Clips through segment, depth and detect: a clip of as many frames, each bad one named, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from cli_models import run_json, save_task_models
from model_parts import PATCH, SQUARE
from models import make_model
from PIL import Image

from ailurus_hf import SegmenterImageProcessor
from ailurus_hf.cli import main
from ailurus_hf.video import open_clip, write_video

SIDE = SQUARE[0] * PATCH
ENDINGS = {"segment": "_overlay", "depth": "_depth", "detect": "_boxes"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_task_models(folder)
    make_model("Segmenter(ViT, mask transformer)").save_pretrained(folder / "segment")
    SegmenterImageProcessor(size={"shortest_edge": SIDE}, window_size=SIDE).save_pretrained(folder / "segment")
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), dtype=np.uint8)
    write_video("walk.mp4", [Image.fromarray(frame) for frame in pixels], fps=12)
    Path("walk.mkv").write_bytes(Path("walk.mp4").read_bytes())
    Path("broken.mp4").write_bytes(Path("walk.mp4").read_bytes()[:200])
    Image.fromarray(pixels[0]).save("photo.png")


def given(command: str, models: Path, *rest: str) -> list[str]:
    return [command, *rest, "--model", str(models / command), "--keep-ratio", "0.5", "--cluster-location", "1"]


@pytest.mark.parametrize("command", ENDINGS)
def test_a_clip_becomes_a_clip(command: str, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = run_json(capsys, *given(command, models, "walk.mp4", "--output", "out"))
    (clip,) = told["clips"]
    assert clip["frames"] == 3 and clip["ms"] > 0 and clip["tokens"][1] == clip["tokens"][0] // 2
    assert clip["file"] == str(Path("out") / f"walk{ENDINGS[command]}.mp4") and told["failed"] == []
    written, read = open_clip(clip["file"]), open_clip("walk.mp4")
    assert written.size == read.size and written.fps == read.fps == 12
    frames = [np.asarray(frame, dtype=float) for frame in written]
    assert len(frames) == 3 and all(abs(a - b).mean() > 5 for a, b in zip(frames, map(np.asarray, read), strict=True))


def test_a_bad_clip_is_named_and_the_rest_is_done(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(given("segment", models, "broken.mp4", "walk.mp4")) == 1
    out, err = capsys.readouterr()
    assert out.startswith("walk.mp4: 3 frames, ") and " tokens, ailurus_output/walk_overlay.mp4" in out
    assert "ailurus-hf segment: error: " in err and "broken.mp4" in err and "Traceback" not in err
    assert main(given("segment", models, "broken.mp4", "walk.mp4", "--overwrite", "--json-lines")) == 1
    bad, good = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert "broken.mp4" in bad["error"] and good["frames"] == 3
    assert [file.name for file in Path("ailurus_output").iterdir()] == ["walk_overlay.mp4"]


def test_results_that_are_there_stay(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = given("segment", models, "walk.mp4", "--output", "out")
    assert main(call) == 0
    before = Path("out/walk_overlay.mp4").stat().st_mtime_ns
    assert main(call) == 2 and "is there already" in capsys.readouterr().err
    assert run_json(capsys, *call, "--resume")["skipped"] == ["walk.mp4"]
    assert Path("out/walk_overlay.mp4").stat().st_mtime_ns == before
    assert main([*call, "--resume", "--keep-ratio", "0.25"]) == 2
    assert "was made with keep_ratio 0.5, not 0.25: --resume goes on" in capsys.readouterr().err
    assert main([*call, "--overwrite"]) == 0 and Path("out/walk_overlay.mp4").stat().st_mtime_ns != before
    assert main(given("segment", models, "walk.mp4", "walk.mkv", "--output", "both")) == 0
    assert {file.name for file in Path("both").iterdir()} == {"walk_mp4_overlay.mp4", "walk_mkv_overlay.mp4"}


def test_a_clip_of_somebody_elses_is_no_result(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    shutil.copy("walk.mp4", "out/walk_overlay.mp4")
    assert main([*given("segment", models, "walk.mp4", "--output", "out"), "--resume"]) == 2
    assert "is no result of this command" in capsys.readouterr().err


@pytest.mark.parametrize(
    "rest, message",
    [(["walk.mp4", "photo.png"], "give clips alone"), (["walk.mp4", "--compare"], "--compare takes images")],
)
def test_what_no_clip_can_have_is_refused(
    rest: list[str], message: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(given("segment", models, *rest)) == 2
    assert message in capsys.readouterr().err
