"""Versions: the installed ones as the libraries tell them, what is too old, and a torchvision of another build."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ailurus_hf import versions
from ailurus_hf.extras import needs_extra
from ailurus_hf.versions import OLDEST, VersionError, installed_version, too_old, torchvision_advice

ROOT = Path(__file__).parents[1]


def run(code: str, *folders: Path) -> str:
    """The last line that code prints in a fresh interpreter, which sees `folders` before all else."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*folders, ROOT)))}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True)
    return (done.stdout + done.stderr).strip().splitlines()[-1]


def pretend(folder: Path, distribution: str, version: str) -> Path:
    """A folder with the metadata of an installed distribution."""
    info = folder / f"{distribution}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    return folder


def test_torch_is_told_with_its_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA build's metadata says 2.14.1 where torch says 2.14.1+cu130."""
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.14.1")
    monkeypatch.setattr(torch, "__version__", "2.14.1+cu130")
    assert installed_version("torch") == "2.14.1+cu130"
    assert installed_version("transformers") == "2.14.1"


def test_what_is_not_installed_has_no_version() -> None:
    assert installed_version("ailurus-hf-nowhere") is None


@pytest.mark.parametrize(
    ("version", "old"),
    [
        ("2.10.9", True),
        ("2.9.1+cu128", True),
        ("1.99", True),
        ("2", True),
        ("2.11", False),
        ("2.11.0a0+git1", False),
        ("2.14.1+cu130", False),
        ("3.0.0.dev0", False),
        ("10.0", False),
    ],
)
def test_versions_are_compared_by_number(monkeypatch: pytest.MonkeyPatch, version: str, old: bool) -> None:
    monkeypatch.setitem(OLDEST, "torch", "2.11")
    monkeypatch.setattr(torch, "__version__", version)
    assert (too_old("torch") is not None) == old


@pytest.mark.parametrize(
    ("part", "distribution"),
    [
        ("ailurus_hf.vision", "transformers"),
        ("ailurus_hf.vision", "accelerate"),
        ("ailurus_hf.segmenter", "transformers"),
        ("ailurus_hf.diffusion", "diffusers"),
        ("ailurus_hf.pipelines.controlvideo", "diffusers"),
    ],
)
def test_too_old_a_library_is_told_at_import(part: str, distribution: str, tmp_path: Path) -> None:
    code = f"import {part}"
    told = run(code, pretend(tmp_path, distribution, "0.1.2"))
    assert "VersionError" in told
    assert f"{distribution} 0.1.2 is too old: ailurus_hf needs >= {OLDEST[distribution]}" in told


def test_too_old_a_torch_is_told_at_import() -> None:
    told = run("import torch; torch.__version__ = '2.0.1+cpu'; import ailurus_hf.vision")
    assert f"torch 2.0.1+cpu is too old: ailurus_hf needs >= {OLDEST['torch']}" in told


def test_names_of_the_package_tell_it_too_as_an_import_error(tmp_path: Path) -> None:
    code = """
try:
    from ailurus_hf import AiluRusModel
except ImportError as error:
    print(type(error).__name__, error)
"""
    told = run(code, pretend(tmp_path, "transformers", "5.0.0"))
    assert told.startswith(f"VersionError transformers 5.0.0 is too old: ailurus_hf needs >= {OLDEST['transformers']}")


def test_a_torchvision_of_another_build_is_told_with_the_one_that_fits(tmp_path: Path) -> None:
    """transformers imports torchvision wherever it sees it, and then says only that it "could not import module"."""
    broken = pretend(tmp_path, "torchvision", "0.1.0") / "torchvision"
    broken.mkdir()
    (broken / "__init__.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")')
    told = run("from ailurus_hf import AiluRusModel", tmp_path)
    fitting = f"torchvision==0.{int(torch.__version__.split('.')[1]) + 15}.*"
    assert "VersionError" in told and "operator torchvision::nms does not exist" in told
    assert f"torchvision 0.1.0 was not built for torch {torch.__version__}" in told and fitting in told


@pytest.mark.parametrize(
    ("build", "advice"),
    [
        ("2.13.0+cpu", 'pip install "torchvision==0.28.*" --index-url https://download.pytorch.org/whl/cpu'),
        ("2.14.1+cu130", 'pip install "torchvision==0.29.*"'),
        ("2.11.0", 'pip install "torchvision==0.26.*"'),
    ],
)
def test_the_fitting_torchvision(monkeypatch: pytest.MonkeyPatch, build: str, advice: str) -> None:
    monkeypatch.setattr(torch, "__version__", build)
    assert torchvision_advice(RuntimeError("x")).endswith(advice)


def test_other_errors_pass_through() -> None:
    for error in (RuntimeError("no memory"), ImportError("cannot import name 'x'"), VersionError("old")):
        with pytest.raises(type(error)) as caught, needs_extra("vision", "x"):
            raise error
        assert caught.value is error


def test_no_module_asks_the_metadata_itself() -> None:
    for path in ROOT.glob("ailurus_hf/**/*.py"):
        if path.name != "versions.py":
            assert "importlib.metadata" not in path.read_text(), path
    assert versions.installed_version("torch") == torch.__version__
