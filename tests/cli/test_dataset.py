"""Images of a data set: from disk, from local files as a stream; each row has its number for a name."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from cli_models import run_json
from PIL import Image
from ranks import Ranks

from ailurus_hf.cli import main

datasets = pytest.importorskip("datasets", reason="needs the extra datasets")


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows on disk, the third unreadable; and the readable ones as a folder of images."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    rows: list[dict] = []
    for seed in range(5):
        pixels = np.random.default_rng(seed).integers(0, 256, (32, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
        rows.append({"bytes": file.getvalue() if seed != 2 else b"no image", "path": None})
        if seed != 2:
            Path(f"photos/{seed}.png").write_bytes(file.getvalue())
    features = datasets.Features({"picture": datasets.Image(), "number": datasets.Value("int64")})
    found = datasets.Dataset.from_dict({"picture": rows, "number": list(range(5))}, features=features)
    found.save_to_disk("data")


def segment(models: Path, *options: str) -> list[str]:
    return ["segment", "--model", str(models / "segmenter"), "--device", "cpu", *options]


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_rows_on_disk_are_images(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(segment(models, "--dataset", "data", "--output", "out", "--json")) == 1
    found = json.loads(capsys.readouterr().out)
    assert [each["image"] for each in found["images"]] == ["00000000", "00000001", "00000003", "00000004"]
    error = "row 00000002 of data is not a readable image: cannot identify image file"
    assert found["failed"] == [{"image": "00000002", "error": error}]
    assert main(segment(models, "photos", "--output", "files")) == 0
    for row, file in (("00000003", "3"), ("00000004", "4")):
        first, second = Image.open(f"out/{row}_labels.png"), Image.open(f"files/{file}_labels.png")
        assert np.array_equal(np.asarray(first), np.asarray(second))


def test_a_stream_is_read_in_order_and_resumes(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = segment(models, "--dataset", "photos", "--streaming", "--output", "out")
    assert main(given) == 2 and "--rows is needed" in capsys.readouterr().err
    assert len(run_json(capsys, *given, "--rows", "2")["images"]) == 2
    found = run_json(capsys, *given, "--rows", "4", "--resume")
    assert [each["image"] for each in found["images"]] == ["00000002", "00000003"] and len(found["skipped"]) == 2
    assert main([*given, "--rows", "9", "--resume"]) == 2
    assert "photos ends before row 4: --rows is more than it has" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--dataset", "data"], ["--dataset", "photos", "--streaming", "--rows", "4"]])
def test_processes_share_the_rows(
    options: list[str], models: Path, ranks: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(segment(models, *options, "--output", "one"))
    first, second = ranks(*segment(models, *options, "--output", "more"))
    assert (first.code, second.code) == (code, 0), first.err
    assert contents("more") == contents("one")
    assert first.out.replace("more", "one") == capsys.readouterr().out


def test_what_cannot_be_is_told(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("nothing").mkdir()
    for options, told in (
        (["--dataset", "nothing"], "cannot load data set nothing, split train: "),
        (
            ["--dataset", "data", "--column", "number"],
            "data has no images in column 'number'; those with images: ['pic",
        ),
        (["--dataset", "data", "photos"], "--dataset and files do not go together"),
    ):
        assert main(segment(models, *options)) == 2
        assert told in capsys.readouterr().err
