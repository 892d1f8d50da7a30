"""Lines, a bar and JSON: what a command says while it goes through images."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import AiluRusError
from .launchers import launched

if TYPE_CHECKING:
    from ..evaluation.loading import LoadedModel

Item = TypeVar("Item")


def progress(items: Sequence[Item]) -> Iterable[Item]:
    """The items, with a bar on stderr where they take more than two seconds and someone is watching."""
    from tqdm import tqdm

    return tqdm(items, delay=2, disable=True if launched().rank else None, leave=False, unit="image")


def tell(line: str, file: Any = None) -> None:
    """A line on stderr, or on another file, above the bar where there is one."""
    from tqdm import tqdm

    tqdm.write(line, file=file or sys.stderr)
    (file or sys.stderr).flush()  # a reader behind a pipe sees each as it comes


def reason_of(path: str | Path, error: Exception) -> str:
    """Why a file failed. Processors and models refuse one in as many ways as there are of them."""
    return str(error) if isinstance(error, AiluRusError) else f"{path}: {type(error).__name__}: {error}"


def print_json(loaded: LoadedModel | None, **fields: Any) -> None:
    """The model, how it is reduced, and the fields, as JSON on stdout."""
    from .. import ailurus_status

    found: dict[str, Any] = {}
    if loaded is not None:
        found = {
            "model": loaded.name,
            "device": str(loaded.device),
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "ailurus": ailurus_status(loaded.model).to_dict() if loaded.ailurus else None,
        }
    print(json.dumps(found | fields, indent=2))
