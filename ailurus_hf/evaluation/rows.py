"""The images of a data set of the `datasets` library, by row: from the Hub, from local files, or as a stream."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..extras import require
from ..images import READING_ERRORS, Image, ImageError, ImageOps, read_image, to_rgb, why
from .bad_input import BadInputError


class EndOfRowsError(BadInputError):
    """A stream has fewer rows than were asked for."""


class DatasetRows:
    """Rows of a data set that hold an image each.

    paths: a name for each row in order, its number in eight digits. No file has it; it names the row's results.

    Args:
        name: on the Hub, or a folder: of images, of data files, or one that `save_to_disk` wrote.
        split: such as "train" or "validation".
        column: that holds the images; None: the only one that does.
        streaming: read rows as they come and store nothing. They are read in order, once.
        rows: only so many, from the first on; None: all.

    Raises:
        BadInputError: no such data set, split or column; or a stream whose length is not known, without `rows`.
        MissingExtraError: the library is not installed.

    Examples:
        >>> rows = DatasetRows("scene_parse_150", "validation")  # doctest: +SKIP
        >>> picture = rows.read(rows.paths[0])  # doctest: +SKIP
    """

    def __init__(
        self, name: str, split: str, column: str | None = None, streaming: bool = False, rows: int | None = None
    ) -> None:
        datasets = require("datasets", "datasets")
        self.name = name
        try:
            if (Path(name) / "state.json").is_file():
                found = datasets.load_from_disk(name)
            else:
                found = datasets.load_dataset(name, split=split, streaming=streaming)
        except Exception as error:  # of the library, of the files' formats, of the network
            raise BadInputError(f"cannot load data set {name}, split {split}: {_first_line(error)}") from error
        features = found.features or {}
        self.column = _image_column(name, {k for k, v in features.items() if isinstance(v, datasets.Image)}, column)
        count = _length(found, split)
        if count is None and rows is None:
            raise BadInputError(f"how many rows {name} has is not known before they are read: --rows is needed")
        count = min(count, rows) if count is not None and rows is not None else count or rows or 0
        self.paths = [Path(f"{number:08d}") for number in range(count)]
        # As bytes, so that an image that cannot be decoded is that row alone.
        self._rows = found.cast_column(self.column, datasets.Image(decode=False)) if count else found
        self._stream: Iterator[tuple[int, Any]] | None = enumerate(self._rows) if streaming else None

    def read(self, path: Path) -> Image.Image:
        """The image of a row, as `read_image` gives it; of a stream no row before the last one read.

        Raises:
            ImageError: the row holds no image that can be read.
            EndOfRowsError: a stream ends before it.
        """
        number = int(path.name)
        value = self._value(number)
        if value is None or (value["bytes"] is None and not value["path"]):
            raise ImageError(f"row {path} of {self.name} holds no image")
        if value["bytes"] is None:
            return read_image(value["path"])
        try:
            with Image.open(io.BytesIO(value["bytes"])) as file:
                file.load()
                return to_rgb(ImageOps.exif_transpose(file))
        except ImageError as error:
            raise ImageError(f"row {path} of {self.name}: {error}") from error
        except READING_ERRORS as error:
            reason = why(error, path).partition(" <_io.")[0]  # where in memory the bytes were
            raise ImageError(f"row {path} of {self.name} is not a readable image: {reason}") from error

    def _value(self, number: int) -> Any:
        if self._stream is None:
            return self._rows[number][self.column]
        for place, row in self._stream:
            if place == number:
                return row[self.column]
        raise EndOfRowsError(f"{self.name} ends before row {number}: --rows is more than it has")


def _image_column(name: str, images: set[str], column: str | None) -> str:
    if column is not None and column not in images:
        raise BadInputError(f"{name} has no images in column {column!r}; those with images: {sorted(images)}")
    if column is None and len(images) != 1:
        raise BadInputError(f"{name} has images in columns {sorted(images)}: name one with --column")
    return column or next(iter(images))


def _length(found: Any, split: str) -> int | None:
    if hasattr(found, "__len__"):
        return len(found)
    splits = found.info.splits or {}
    return splits[split].num_examples or None if split in splits else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:300]
