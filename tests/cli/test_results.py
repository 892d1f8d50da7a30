"""Results that are there: none is replaced unasked, a run that was killed goes on, and its results are the same."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ailurus_hf.cli import main
from ailurus_hf.evaluation.writing import ResultFolder

ROOT = str(Path(__file__).parents[2])


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_images(folder: str, number: int) -> list[Path]:
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = [Path(folder, f"{seed:04d}.png") for seed in range(number)]
    for seed, path in enumerate(paths):
        pixels = np.random.default_rng(seed).integers(0, 256, (32, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


def segment(models: Path, *options: str) -> list[str]:
    return ["segment", "images", "--model", str(models / "segmenter"), "--output", "out", *options]


def contents(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_results_are_not_replaced_unasked(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_images("images", 2)
    assert main(segment(models)) == 0
    before = contents("out")
    capsys.readouterr()
    # Found before the model loads.
    assert main(["segment", "images", "--model", "./nowhere", "--output", "out"]) == 2
    told = capsys.readouterr().err
    assert "out/0000_labels.png is there already (and 3 other results)" in told and "--overwrite" in told
    assert contents("out") == before
    assert main(segment(models, "--no-ailurus", "--overwrite")) == 0
    assert set(contents("out")) == set(before) and contents("out") != before


def test_a_file_of_the_users_own_stays(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_images("images", 1)
    Path("out").mkdir()
    Image.new("L", (3, 3)).save("out/0000_labels.png")
    mine = contents("out")
    for options in ([], ["--resume"]):
        assert main(segment(models, *options)) == 2
        assert "out/0000_labels.png" in capsys.readouterr().err
    assert contents("out") == mine


@pytest.mark.parametrize("options", [[], ["--overwrite"], ["--resume"]])
def test_no_result_takes_the_place_of_an_image(
    options: list[str], models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (image,) = make_images("images", 1)
    labels = image.rename("images/a.png").with_name("a_labels.png")
    Image.new("RGB", (40, 32)).save(labels)
    before = contents("images")
    given = ["images/a.png", "images/a_labels.png", "--model", str(models / "segmenter"), "--output", "images"]
    assert main(["segment", *given, *options]) == 2
    assert "images/a_labels.png is read as an image and would be replaced" in capsys.readouterr().err
    assert main(["segment", "images", *given[2:], *options]) == 2
    assert "choose another --output" in capsys.readouterr().err
    assert contents("images") == before


def test_results_are_not_taken_for_images_the_next_time(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_images("all/inner", 2)
    given = ["segment", "all", "--recursive", "--model", str(models / "segmenter"), "--output", "all/out", "--json"]
    assert main(given) == 0
    capsys.readouterr()
    assert main([*given, "--overwrite"]) == 0
    assert len(json.loads(capsys.readouterr().out)["images"]) == 2


def test_resume_does_what_is_missing(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_images("images", 4)
    assert main(segment(models)) == 0
    before = contents("out")
    for gone in ("0001_labels.png", "0001_overlay.png", "0003_overlay.png"):
        Path("out", gone).unlink()
    capsys.readouterr()
    assert main(segment(models, "--resume", "--json")) == 0
    streams = capsys.readouterr()
    found = json.loads(streams.out)
    assert [Path(image["image"]).name for image in found["images"]] == ["0001.png", "0003.png"]
    assert [Path(image).name for image in found["skipped"]] == ["0000.png", "0002.png"]
    assert "2 done, 2 skipped (their results are there), 0 failed" in streams.err
    assert contents("out") == before
    assert main(segment(models, "--resume", "--keep-ratio", "0.25")) == 2
    assert "was made with keep_ratio None, not 0.25" in capsys.readouterr().err


def test_leftovers_of_killed_processes_go(models: Path) -> None:
    done = subprocess.Popen([sys.executable, "-c", "pass"])
    done.wait()
    make_images("images", 1)
    assert main(segment(models)) == 0
    before = contents("out")
    host = os.uname().nodename
    Path(f"out/.ailurus-{host}-{done.pid}.png").write_bytes(b"half")
    Path(f"out/.ailurus-{host}-{os.getpid()}.png").write_bytes(b"another thread's")
    assert main(segment(models, "--resume")) == 0
    assert set(contents("out")) == {*before, f".ailurus-{host}-{os.getpid()}.png"}


@pytest.fixture
def killed() -> Iterator[list[subprocess.Popen]]:
    processes: list[subprocess.Popen] = []
    yield processes
    for process in processes:
        process.kill()


def test_killed_and_resumed_is_the_same_byte_for_byte(
    models: Path, killed: list[subprocess.Popen], capsys: pytest.CaptureFixture[str]
) -> None:
    paths = make_images("images", 60)
    for bad in paths[::12]:
        bad.write_bytes(bad.read_bytes()[:200])
    assert main(segment(models, "--device", "cpu", "--output", "whole")) == 1
    capsys.readouterr()
    command = [sys.executable, "-m", "ailurus_hf.cli", *segment(models, "--device", "cpu", "--json-lines")]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": ROOT}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    killed.append(process)
    lines = [process.stdout.readline() for _ in range(30)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert all(json.loads(line)["image"] for line in lines)
    assert 30 - 5 <= len(list(Path("out").glob("*_overlay.png"))) < 55
    assert main(segment(models, "--device", "cpu", "--resume")) == 1
    assert "skipped" in capsys.readouterr().err
    assert contents("out") == contents("whole") and len(contents("out")) == 2 * 55


def test_scores_go_to_a_file_of_lines_and_resume(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_images("images", 4)
    given = ["classify", "images", "--model", str(models / "vit"), "--output", "deep/scores.jsonl"]
    assert main(given) == 0
    whole = Path("deep/scores.jsonl").read_bytes()
    assert [json.loads(line)["image"] for line in whole.splitlines()] == [f"images/{i:04d}.png" for i in range(4)]
    assert main(given) == 2 and "is there already" in capsys.readouterr().err
    lines = whole.splitlines(keepends=True)
    Path("deep/scores.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:20])  # killed while it wrote
    assert main([*given, "--resume"]) == 0
    assert Path("deep/scores.jsonl").read_bytes() == whole
    assert main([*given, "--resume", "--keep-ratio", "0.25"]) == 2 and "same settings" in capsys.readouterr().err
    Path("deep/scores.jsonl").write_text("my notes\n")
    assert main([*given, "--resume"]) == 2 and "no result of this command" in capsys.readouterr().err
    assert Path("deep/scores.jsonl").read_text() == "my notes\n"


def test_lines_of_json_come_as_images_are_done(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = make_images("images", 3)
    paths[1].write_text("no image")
    assert main(["classify", "images", "--model", str(models / "vit"), "--json-lines"]) == 1
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(found[0]) == ["error", "image"] and [sorted(line) for line in found[1:]] == [["image", "scores"]] * 2


def test_several_at_once_are_each_alone(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_images("images", 5)
    Image.new("RGB", (64, 24)).save("images/0002.png")  # of another size
    for options in (["--output", "alone"], ["--output", "together", "--batch-size", "3"]):
        assert main(segment(models, *options, "--json")) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["took"]["ms"] > 0 and found["took"]["tokens"] == [20, 10]
    for name in contents("alone"):
        first, second = (np.asarray(Image.open(f"{folder}/{name}")) for folder in ("alone", "together"))
        assert (first == second).mean() > 0.99, name


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ResultFolder(tmp_path / "out", ["_x.png"], "refuse", {})
    monkeypatch.setattr(Image.Image, "save", lambda self, path, **options: (path.touch(), time.sleep(0), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        folder.save(Image.new("L", (2, 2)), folder.files(Path("a"))[0])
    assert list((tmp_path / "out").iterdir()) == []
