"""`ailurus-hf tune`: a table or JSON, a file that other commands and `AiluRusConfig` take, bad images named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from cli_models import save_models
from PIL import Image

from ailurus_hf import AiluRusConfig, AiluRusModelForImageClassification, ailurus_status
from ailurus_hf.cli import main
from ailurus_hf.evaluation.tuned import Tuned


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_models(tmp_path_factory.mktemp("tune"))
    (folder / "images").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    return folder


def test_the_result_is_a_config_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "images"
    shutil.copytree(folder / "images", images)
    (images / "4.png").write_text("no image")
    file = tmp_path / "tuned.json"
    call = ["tune", str(images), "--model", str(folder / "vit"), "--max-loss", "1", "--rounds", "1"]
    reduced = tmp_path / "reduced"
    assert main([*call, "--save", str(file), "--save-model", str(reduced)]) == 1
    printed = capsys.readouterr()
    assert "speed-up" in printed.out and "4.png" in printed.err
    tuned = Tuned.load(file)
    assert AiluRusConfig.load(file) == tuned.best and tuned.rows[tuned.chosen].label in printed.out
    classify = ["classify", str(folder / "images"), "--model", str(folder / "vit"), "--json"]
    assert main([*classify, "--config", str(file)]) == 0
    assert json.loads(capsys.readouterr().out)["ailurus"]["config"] == tuned.best.to_dict()
    status = ailurus_status(AiluRusModelForImageClassification.from_pretrained(reduced))
    assert status.config == tuned.best.to_dict() and "library_name: ailurus_hf" in (reduced / "README.md").read_text()
    assert main([*call, "--save-model", str(reduced)]) == 2 and "is there already" in capsys.readouterr().err
    file.write_text(json.dumps({**tuned.to_dict(), "kind": "AiluRusDiffusionConfig"}))
    assert main([*classify, "--config", str(file)]) == 2
    assert "is a AiluRusDiffusionConfig, and no AiluRusConfig" in capsys.readouterr().err
    assert main([*call, "--limit", "1", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["tuned"]["goal"] == {"max_loss": 1.0}


def test_wrong_calls_before_the_model_loads(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["tune", str(folder / "images"), "--model", "nowhere"]
    assert main([*call, "--speedup", "0.5"]) == 2
    assert "speedup must be above 1, got 0.5" in capsys.readouterr().err
    assert main([*call, "--save", str(folder / "none" / "tuned.json")]) == 2
    assert "no folder" in capsys.readouterr().err
