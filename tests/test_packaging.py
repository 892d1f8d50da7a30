"""What users install: the wheel's content, imports from it and from an editable install, and what an import costs."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import ailurus_hf
from ailurus_hf.cli.doctor import EXTRAS

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def python(code: str, folder: Path, **environment: str) -> str:
    """Runs code in a fresh interpreter that does not see this checkout; returns what it printed."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def build(target: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_the_package_with_its_pipelines_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"ailurus_hf/__init__.py", "ailurus_hf/py.typed", "ailurus_hf/pipelines/__init__.py"} <= names
    sources = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("ailurus_hf/**/*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    assert "ailurus_hf/visualization/report.html" in names
    assert {name.split("/")[0] for name in names} == {"ailurus_hf", f"ailurus_hf-{PROJECT['version']}.dist-info"}
    assert wheel.stat().st_size < 2**20  # no weights, no pictures


def test_an_installed_wheel_imports_with_its_pipelines_and_command(wheel: Path, tmp_path: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target"]
    subprocess.run([*install, str(tmp_path / "site"), str(wheel)], check=True, capture_output=True)
    code = "import ailurus_hf, ailurus_hf.pipelines as p; print(ailurus_hf.__file__, p.__file__, p.__name__, sep='|')"
    package, pipelines, name = python(code, tmp_path, PYTHONPATH=str(tmp_path / "site")).split("|")
    assert Path(package) == tmp_path / "site/ailurus_hf/__init__.py"
    assert Path(pipelines) == tmp_path / "site/ailurus_hf/pipelines/__init__.py"
    assert name == "ailurus_hf.pipelines"
    command = (tmp_path / "site/bin/ailurus-hf").read_text()
    assert "from ailurus_hf.cli import main" in command


# What torch and numpy import, and nothing that an extra installs.
ALONE = ("torch", "torchgen", "functorch", "numpy", "numpy.libs", "typing_extensions.py", "sympy", "mpmath", "networkx")
ALONE += ("jinja2", "markupsafe", "filelock", "fsspec", "triton", "nvidia")


@pytest.fixture(scope="module")
def empty_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that is all an interpreter sees: the installed wheel, torch and numpy."""
    site = tmp_path_factory.mktemp("empty") / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target"]
    subprocess.run([*install, str(site), str(wheel)], check=True, capture_output=True)
    installed = Path(torch.__file__).parents[1]
    for name in ALONE:
        if (installed / name).exists():
            (site / name).symlink_to(installed / name)
    return site


def in_empty_environment(site: Path, *command: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(site)}
    return subprocess.run([sys.executable, "-S", *command], cwd=site.parent, env=env, capture_output=True, text=True)


def test_in_an_empty_environment_torch_is_enough_and_each_extra_is_named(empty_environment: Path) -> None:
    code = """
import importlib, torch, ailurus_hf
ailurus_hf.spatial_density_peaks(torch.rand(1, 12, 4), (3, 4), 5)
ailurus_hf.AiluRusConfig(cluster_location=1, num_clusters=4)
for module, name in (
    ("ailurus_hf", "AiluRusModel"),
    ("ailurus_hf", "SegmenterConfig"),
    ("ailurus_hf", "AiluRusProcessor"),
    ("ailurus_hf.pipelines", "ControlVideoPipeline"),
    ("ailurus_hf.detection", "mask_rcnn"),
    ("ailurus_hf.video", "open_clip"),
    ("ailurus_hf.visualization", "draw_assignment"),
):
    try:
        getattr(importlib.import_module(module), name)
        print(name, "is there")
    except ImportError as error:
        print(name, error)
"""
    done = in_empty_environment(empty_environment, "-c", code)
    assert done.returncode == 0, done.stderr
    told = dict(line.split(" ", 1) for line in done.stdout.strip().splitlines())
    extras = {"AiluRusModel": "vision", "SegmenterConfig": "vision", "AiluRusProcessor": "diffusion"}
    extras |= {"ControlVideoPipeline": "video", "open_clip": "video"}
    for name, extra in extras.items():
        assert told[name].endswith(f'pip install "ailurus-hf[{extra}]"'), told[name]
    for name in told.keys() - extras.keys():
        assert 'pip install "ailurus-hf[' in told[name], told[name]


def test_in_an_empty_environment_doctor_tells_what_is_missing(empty_environment: Path) -> None:
    done = in_empty_environment(empty_environment, str(empty_environment / "bin/ailurus-hf"), "doctor")
    assert done.returncode == 0, done.stderr
    for extra in EXTRAS:
        assert f'pip install "ailurus-hf[{extra}]"' in done.stdout
    assert f"torch                    {torch.__version__}" in done.stdout and "self-check not run" in done.stdout


def test_an_editable_install_imports_the_pipelines_of_the_checkout(tmp_path: Path) -> None:
    built = build("wheel:editable", tmp_path / "wheel")
    zipfile.ZipFile(built).extractall(tmp_path / "site")
    # Before an editable install that the environment itself may hold.
    code = f"""
import site, sys
known = list(sys.path)
site.addsitedir({str(tmp_path / "site")!r})
sys.path.sort(key=lambda path: path in known)
import ailurus_hf.pipelines as p
print(p.__file__)
"""
    file = Path(python(code, tmp_path))
    assert file == ROOT / "ailurus_hf/pipelines/__init__.py"


def test_the_source_distribution_holds_the_pipelines(tmp_path: Path) -> None:
    with tarfile.open(build("sdist", tmp_path)) as archive:
        names = archive.getnames()
    assert any(name.endswith("/ailurus_hf/pipelines/__init__.py") for name in names)


def test_a_wheel_of_the_source_distribution_is_the_same(wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(build("sdist", tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "wheel")]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (again,) = (tmp_path / "wheel").iterdir()
    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(wheel).namelist())


def test_the_package_index_takes_both_and_shows_the_readme(wheel: Path, tmp_path: Path) -> None:
    metadata = zipfile.ZipFile(wheel).read(f"ailurus_hf-{PROJECT['version']}.dist-info/METADATA").decode()
    for name in ("Homepage", "Documentation", "Repository", "Issues", "Changelog"):
        assert f"Project-URL: {name}, https://" in metadata
    assert "Description-Content-Type: text/markdown" in metadata and (ROOT / "README.md").read_text() in metadata
    assert "Author: The ailurus_hf authors" in metadata and "License-File: LICENSE" in metadata
    pytest.importorskip("twine")
    command = [sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(build("sdist", tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_classifiers_are_known() -> None:
    classifiers = pytest.importorskip("trove_classifiers").classifiers
    assert set(PROJECT["classifiers"]) <= set(classifiers)


def test_nothing_in_the_repository_is_a_link() -> None:
    """Links break checkouts on Windows."""
    listed = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert [line for line in listed.stdout.splitlines() if line.startswith("120000")] == []


def test_importing_the_package_loads_no_optional_library(tmp_path: Path) -> None:
    code = """
import sys, time
import torch
start = time.perf_counter()
import ailurus_hf
print(time.perf_counter() - start)
optional = {"transformers", "diffusers", "PIL", "matplotlib", "accelerate", "torchvision"}
print(*optional & set(sys.modules))
"""
    seconds, loaded = (python(code, tmp_path, PYTHONPATH=str(ROOT)) + "\n").split("\n")[:2]
    assert loaded == ""
    assert float(seconds) < 1


def test_the_version_is_the_same_everywhere() -> None:
    assert ailurus_hf.__version__ == PROJECT["version"]
    assert f"version: {PROJECT['version']}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


def names_of(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=]", name)[0].lower() for name in requirements} - {"ailurus-hf"}


def test_doctor_knows_the_extras() -> None:
    extras = {extra: names_of(needed) for extra, needed in PROJECT["optional-dependencies"].items()}
    del extras["all"], extras["test"], extras["docs"]
    extras["video"].add("imageio-ffmpeg")  # what imageio[ffmpeg] stands for
    assert {extra: set(names) for extra, names in EXTRAS.items()} == extras


def test_constraints_pin_what_make_installs() -> None:
    pinned = {re.split(r"[=;]", line)[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    extras = dict(PROJECT["optional-dependencies"])
    del extras["triton"]  # which torch pins where it needs it
    needed = names_of(PROJECT["dependencies"] + [name for extra in extras.values() for name in extra])
    assert needed - pinned == set()
