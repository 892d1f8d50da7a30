"""The folder of a Hugging Face Space: its header is one, and its program starts the page."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

import ailurus_hf.app
from ailurus_hf.cli.doctor import EXTRAS

SPACE = Path(__file__).parents[2] / "examples" / "space"
ROOT = Path(__file__).parents[2]


def test_its_header_names_what_is_there() -> None:
    _, header, text = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    found = yaml.safe_load(header)
    assert found["sdk"] == "gradio" and (SPACE / found["app_file"]).is_file() and text.strip()
    assert f"gradio=={found['sdk_version']}\n" in (ROOT / "constraints.txt").read_text()
    (requirement,) = (SPACE / "requirements.txt").read_text().splitlines()
    (extra,) = re.findall(r"^ailurus-hf\[(\w+)\] @ git\+https://", requirement)
    assert extra in EXTRAS


def test_its_program_starts_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(ailurus_hf.app, "launch", lambda *given, **options: called.append((given, options)))
    monkeypatch.setattr(sys, "argv", ["app.py"])
    (tmp_path / "app.py").write_text((SPACE / "app.py").read_text())
    runpy.run_path(str(tmp_path / "app.py"), run_name="__main__")
    Image.new("RGB", (8, 8)).save(tmp_path / "example.jpg")
    monkeypatch.setenv("MODEL", "my-segmenter")
    runpy.run_path(str(tmp_path / "app.py"), run_name="__main__")
    (first, options), (second, with_example) = called
    assert "/" in first[0] and options["host"] == "0.0.0.0" and options["example"] is None
    assert second == ("my-segmenter",) and with_example["example"] == tmp_path / "example.jpg"
