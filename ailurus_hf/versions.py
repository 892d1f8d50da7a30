"""Versions: what is installed, the oldest that works, and which torchvision belongs to a torch.

How a library behaves is probed where it is used, never read off its version; a version only tells what is too old.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re

from .errors import AiluRusError

# The oldest releases that were tried, as pyproject.toml declares them (constraints-oldest.txt). Large parts of the
# suite have run with them, and not yet the whole.
OLDEST = {"torch": "2.11", "transformers": "5.17", "diffusers": "0.39", "accelerate": "1.13"}


class VersionError(AiluRusError, ImportError):
    """A library that is installed is too old, or does not fit another one. The message says which one would do."""


def installed_version(distribution: str) -> str | None:
    """The installed version or None; torch's with its build, which its metadata leaves out (2.14.1+cu130)."""
    if distribution == "torch":
        import torch

        return str(torch.__version__)
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def too_old(distribution: str) -> str | None:
    """What is wrong where the installed version is older than the oldest that works; None where it is not."""
    version = installed_version(distribution)
    if version is None or _release(version) >= _release(OLDEST[distribution]):
        return None
    return f"{distribution} {version} is too old: ailurus_hf needs >= {OLDEST[distribution]}"


def check_versions(*distributions: str) -> None:
    """Raises VersionError where one of these is installed and too old. What is missing is for the import to tell."""
    for distribution in distributions:
        if (problem := too_old(distribution)) is not None:
            raise VersionError(f'{problem}: pip install --upgrade "{distribution}>={OLDEST[distribution]}"')


def torchvision_problem() -> str | None:
    """What is wrong where a torchvision is installed that does not load beside this torch; None where all is well."""
    try:
        if importlib.util.find_spec("torchvision") is None:
            return None
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return None
    except (ImportError, RuntimeError) as error:  # RuntimeError: its operators were built for another torch
        return torchvision_advice(error)
    return None


def torchvision_advice(error: BaseException) -> str:
    """What to install where torchvision fails to load with `error`."""
    torch_version = str(installed_version("torch"))
    minor = _release(torch_version)[1]
    build = torch_version.partition("+")[2] or "the default"
    reason = str(error).strip().splitlines()[0]
    # torchvision 0.(n + 15) is built for torch 2.n.
    return (
        f"torchvision {installed_version('torchvision')} was not built for torch {torch_version} ({reason}): install "
        f"the torchvision of the same build ({build}) from where torch came from: "
        f'pip install "torchvision==0.{minor + 15}.*"'
        + (" --index-url https://download.pytorch.org/whl/cpu" if build == "cpu" else "")
    )


def _release(version: str) -> tuple[int, int]:
    """Major and minor number of "2.14.1+cu130", "5.24.0.dev0" or "2.11"."""
    major, minor = re.findall(r"\d+", version + ".0")[:2]
    return int(major), int(minor)
