"""Real folders: every readable image is done, each bad one is named, and no result overwrites another."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cli_models import save_models
from PIL import Image

from ailurus_hf import SegmenterImageProcessor
from ailurus_hf.cli import main
from ailurus_hf.evaluation.folders import find_images, result_names
from ailurus_hf.evaluation.loading import BadInputError

BAD = ("._a.jpg", "cut.png", "dangling.jpg", "empty.jpg", "folder.jpg", "text.png")


def picture(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_models(tmp_path_factory.mktemp("models"))
    SegmenterImageProcessor(do_resize=True).save_pretrained(folder / "vit_resizing")
    return folder


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three images and one bad file of each kind."""
    folder = tmp_path / "images"
    folder.mkdir()
    for seed, name in enumerate(("a.png", "b.png", "c.png")):
        picture(seed).save(folder / name)
    whole = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("no image")
    (folder / "empty.jpg").write_text("")
    (folder / "._a.jpg").write_bytes(b"\0\5\26\7")
    (folder / "folder.jpg").mkdir()
    (folder / "dangling.jpg").symlink_to(folder / "nowhere.jpg")
    monkeypatch.chdir(tmp_path)
    return folder


COMMANDS = {
    "classify": ["classify", "images", "--model", "vit"],
    "segment": ["segment", "images", "--model", "segmenter", "--output", "out"],
    "compare": ["segment", "images", "--model", "segmenter", "--output", "out", "--compare", "--repeats", "1"],
    "visualize": ["visualize", "images", "--model", "vit", "--output", "out"],
    "benchmark": ["benchmark", "images", "--model", "vit", "--methods", "paper", "--keep", "0.5", "--repeats", "1"],
}


def arguments(name: str, models: Path) -> list[str]:
    return [str(models / word) if word in ("vit", "segmenter") else word for word in COMMANDS[name]]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_readable_image_is_done_and_each_bad_one_named(
    name: str, models: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments(name, models), "--json"]) == 1
    streams = capsys.readouterr()
    found = json.loads(streams.out)
    if name == "benchmark":
        assert found["num_images"] == 3 and len(found["rows"]) == 2
    else:
        assert [Path(image["image"]).name for image in found["images"]] == ["a.png", "b.png", "c.png"]
    assert sorted(Path(failed["image"]).name for failed in found["failed"]) == sorted(BAD)
    lines = streams.err.splitlines()
    assert len(lines) == len(BAD) + 1 and lines[-1] == "3 done, 6 failed", streams.err
    for bad in BAD:
        (line,) = [line for line in lines if f"images/{bad} " in line]
        assert " is not a readable image: " in line
    if "--output" in COMMANDS[name]:
        kinds = {"segment": ("labels", "overlay"), "compare": ("comparison",)}
        kinds["visualize"] = ("assignment", "counts", "rebuilt", "clusters")
        expected = {f"{stem}_{kind}.png" for stem in "abc" for kind in kinds[name]}
        assert {path.name for path in Path("out").iterdir()} == expected


def test_lines_come_for_the_readable_ones(models: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments("classify", models)) == 1
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"images/{stem}.png" for stem in "abc"
    ]


def test_strict_stops_at_the_first_bad_file(models: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments("classify", models), "--strict"]) == 1
    streams = capsys.readouterr()
    assert streams.out == "" and streams.err.count("\n") == 1 and "._a.jpg" in streams.err


def test_all_good_is_0_and_says_nothing_else(models: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", "images/a.png", "images/b.png", "--model", str(models / "vit"), "--json"]) == 0
    streams = capsys.readouterr()
    assert streams.err == "" and json.loads(streams.out)["failed"] == []


def test_what_a_processor_refuses_is_that_image_alone(
    models: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strip = Image.new("RGB", (5000, 7))
    strip.save("strip.png")
    (models / "vit_resizing/config.json").write_bytes((models / "segmenter/config.json").read_bytes())
    (models / "vit_resizing/model.safetensors").write_bytes((models / "segmenter/model.safetensors").read_bytes())
    model = str(models / "vit_resizing")
    assert main(["segment", "images/a.png", "strip.png", "--model", model, "--keep-ratio", "0.5"]) == 1
    streams = capsys.readouterr()
    assert "5000×7 pixels would become 365714×512" in streams.err and "strip.png" in streams.err
    assert "1 done, 1 failed" in streams.err and "images/a.png" in streams.out


@pytest.mark.parametrize("values", [3, 255])
def test_labels_without_a_class_are_told(
    values: int, models: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("labels").mkdir()
    Image.fromarray(np.full((32, 40), values, np.uint8)).save("labels/a.png")
    Image.fromarray(np.zeros((32, 40), np.uint8)).save("labels/b.png")
    given = ["segment", "images/a.png", "images/b.png", "images/c.png", "--model", str(models / "segmenter")]
    assert main([*given, "--compare", "--labels", "labels", "--repeats", "1", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [Path(image["image"]).name for image in found["images"]] == ["b.png"]
    reasons = [failed["error"] for failed in found["failed"]]
    assert f"no label in labels/a.png is a class: its ids go from {values} to {values}" in reasons[0]
    assert "the model's classes from 0 to 2" in reasons[0] and "no such file: labels/c.png" in reasons[1]


def test_a_list_of_images(models: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("photos.txt").write_text("images/c.png\n\nimages/a.png\n")
    given = ["classify", "--model", str(models / "vit"), "--json"]
    assert main([*given, "--list", "photos.txt"]) == 0
    assert [each["image"] for each in json.loads(capsys.readouterr().out)["images"]] == ["images/c.png", "images/a.png"]
    for wrong, told in (([], "no images: name files"), (["--list", "no.txt"], "cannot read --list no.txt: No such")):
        assert main([*given, *wrong]) == 2 and told in capsys.readouterr().err


def test_equal_names_do_not_overwrite_each_other(
    models: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, name in enumerate(("c1/street.jpg", "c2/street.jpg", "c2/street.png")):
        Path(name).parent.mkdir(exist_ok=True)
        picture(seed).save(name)
    given = ["visualize", "c1", "c2", "--model", str(models / "vit"), "--output", "out", "--json"]
    assert main(given) == 0
    files = [file for image in json.loads(capsys.readouterr().out)["images"] for file in image["files"]]
    assert len(set(files)) == 12 and all(Path(file).is_file() for file in files)
    assert {str(p.relative_to("out")) for p in Path("out").rglob("*_rebuilt.png")} == {
        "c1/street_rebuilt.png",
        "c2/street.jpg_rebuilt.png",
        "c2/street.png_rebuilt.png",
    }
    first, second = (Image.open(f"out/{name}_rebuilt.png") for name in ("c1/street", "c2/street.jpg"))
    assert not np.array_equal(np.asarray(first), np.asarray(second))


class TestNames:
    @pytest.fixture(autouse=True)
    def here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for name in ("x/c/a.jpg", "y/c/a.jpg", "y/c/b.png", "y/c/deep/a.jpg", "z/a.jpg", "z/a.png", "z/a.jpg.png"):
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).touch()

    @pytest.mark.parametrize(
        ("paths", "names"),
        [
            (["y/c"], ["a", "b"]),
            (["y/c/a.jpg", "y/c/b.png"], ["a", "b"]),
            (["x/c/a.jpg", "y/c/b.png"], ["a", "b"]),
            (["x/c", "y/c"], ["x/c/a", "y/c/a", "y/c/b"]),
            (["x/c", "z"], ["c/a", "z/a.jpg", "z/a.jpg.png", "z/a.png"]),
            (["x/c/a.jpg", "y/c/a.jpg"], ["x/c/a", "y/c/a"]),
            (["x/c", "x/c/a.jpg", "./x/../x/c"], ["a"]),
        ],
    )
    def test_no_two_are_equal(self, paths: list[str], names: list[str]) -> None:
        assert list(map(str, result_names(paths).values())) == names
        assert list(result_names(paths)) == find_images(paths)

    def test_subfolders(self) -> None:
        assert list(map(str, result_names(["y"], recursive=True).values())) == ["c/a", "c/b", "c/deep/a"]
        with pytest.raises(BadInputError, match=r"no image in folder y; it has 1 subfolders, which --recursive"):
            find_images(["y"])
        with pytest.raises(BadInputError, match="no such file or folder: nowhere"):
            find_images(["y/c", "nowhere"])


def test_subfolders_are_not_left_out_in_silence(models: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("more/deep").mkdir(parents=True)
    picture(0).save("more/a.png")
    picture(1).save("more/deep/a.png")
    given = ["classify", "more", "--model", str(models / "vit"), "--json"]
    assert main(given) == 0
    streams = capsys.readouterr()
    assert len(json.loads(streams.out)["images"]) == 1
    assert "1 subfolders are left out (more/deep …): --recursive looks into them" in streams.err
    assert main([*given, "--recursive"]) == 0
    streams = capsys.readouterr()
    assert len(json.loads(streams.out)["images"]) == 2 and streams.err == ""


def test_an_output_that_cannot_be_written_is_found_before_the_model_loads(
    models: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["visualize", "images/a.png", "--model", "./nowhere", "--output", "images/a.png/out"]
    assert main(given) == 2
    assert "cannot write to folder images/a.png/out" in capsys.readouterr().err


def test_a_name_too_long_for_its_results_is_that_image_alone(
    models: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(0).save(f"{'p' * 245}.png")
    given = ["visualize", f"{'p' * 245}.png", "images/a.png", "--model", str(models / "vit"), "--output", "out"]
    assert main(given) == 1
    streams = capsys.readouterr()
    assert "File name too long" in streams.err and "1 done, 1 failed" in streams.err
    assert {path.name for path in Path("out").iterdir()} == {
        f"a_{kind}.png" for kind in ("assignment", "counts", "rebuilt", "clusters")
    }


ROOT = str(Path(__file__).parents[2])
CLASSIFY = [sys.executable, "-m", "ailurus_hf.cli", "classify", "many", "--device", "cpu", "--model"]


def many(number: int) -> None:
    Path("many").mkdir()
    for seed in range(number):
        picture(seed).save(f"many/{seed:04d}.png")


def test_a_reader_that_has_seen_enough_is_no_error(models: Path, images: Path) -> None:
    many(300)
    environment = {**os.environ, "PYTHONPATH": ROOT}
    command = " ".join([*CLASSIFY, str(models / "vit"), "| head -n 1"])
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("many/0000.png: ") and done.stdout.count("\n") == 1
    assert done.stderr == ""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_and_says_what_is_done(models: Path, images: Path, number: int, code: int) -> None:
    many(3000)
    environment = {**os.environ, "PYTHONPATH": ROOT}
    command = [*CLASSIFY, str(models / "vit")]
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite in the background of a script ignores SIGINT, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout.readline().startswith("many/0000.png")
        time.sleep(0.1)
        process.send_signal(number)
        told = process.communicate()[1]
    assert process.returncode == code, told
    assert " done, 0 failed, " in told and " not begun" in told and "Traceback" not in told
