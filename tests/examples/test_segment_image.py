"""The demo on a tiny model: its table, and its sheet of four panels."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_models import save_models
from PIL import Image

EXAMPLE = Path(__file__).parents[2] / "examples/segment_image.py"


@pytest.mark.parametrize("labeled", [True, False])
def test_the_demo_tells_and_draws(
    labeled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_models(tmp_path)
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(generator.integers(0, 3, (48, 64), dtype=np.uint8)).save(tmp_path / "a_labels.png")
    options = ["--image", "a.png", "--model", "segmenter", "--repeats", "1", "--output", "new/a.png"]
    options += ["--labels", "a_labels.png"] if labeled else []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *options, "--keep-ratio", "0.5"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    told = capsys.readouterr().out
    tokens = next(line for line in told.splitlines() if line.startswith("tokens after layer 2"))
    assert tokens.split()[-2:] == ["48", "24"]
    assert "speed-up" in told and ("mIoU" in told) == labeled
    assert Image.open("new/a.png").width == 2 * (600 + 16) + 16
