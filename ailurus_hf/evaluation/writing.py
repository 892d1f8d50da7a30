"""Result files: whole under their name, or not there at all."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import AiluRusError

if TYPE_CHECKING:
    from PIL import Image


class WritingError(AiluRusError):
    """A result cannot be written, and the next one could not either: no room, no right."""


def make_folder(path: str | Path) -> Path:
    """The folder, made where it is missing. Raises WritingError where nothing could be written into it."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise WritingError(f"cannot write to folder {path}: {error.strerror}") from error
    return Path(path)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a picture under a temporary name beside `path` and renames it.

    Raises:
        WritingError: no room or no right; AiluRusError: this name alone is too long.
    """
    part = path.with_name(f".ailurus-{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            picture.save(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        kind = AiluRusError if error.errno == errno.ENAMETOOLONG else WritingError
        raise kind(f"cannot write {path}: {error.strerror or error}") from error
