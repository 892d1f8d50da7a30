"""Where the images of a command come from: files and folders, a list of them, or a data set."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..evaluation.bad_input import BadInputError

if TYPE_CHECKING:
    from PIL import Image


class Source(NamedTuple):
    """The images of a command.

    paths: one for each, in order. names: for each the relative name of its results, without suffix.
    read: gives the image of a path. check: raises one of READING_ERRORS where its header tells that it holds none.
    left_out: subfolders that are not looked into.
    """

    paths: Sequence[Path]
    names: dict[Path, Path]
    read: Callable[[Path], Image.Image]
    check: Callable[[Path], None]
    left_out: Sequence[Path] = ()


def find_source(args: argparse.Namespace, leave_out: Path | None) -> Source:
    """What the arguments name.

    Args:
        leave_out: as of `find_images`.

    Raises:
        BadInputError: they name nothing, or what is not there.
    """
    if getattr(args, "dataset", None):
        from ..evaluation.rows import DatasetRows

        if args.images or args.list:
            raise BadInputError("--dataset and files do not go together: name one of them")
        rows = DatasetRows(args.dataset, args.split, args.column, args.streaming, args.rows)
        return Source(rows.paths, {path: path for path in rows.paths}, rows.read, lambda path: None)
    from ..evaluation.folders import find_images, result_names, subfolders
    from ..images import read_image

    given = _given(args)
    paths = find_images(given, args.recursive, leave_out)
    names = result_names(given, args.recursive, leave_out)
    return Source(paths, names, read_image, _check_file, () if args.recursive else subfolders(given))


def _check_file(path: Path) -> None:
    from PIL import Image

    with Image.open(path):
        pass


def _given(args: argparse.Namespace) -> list[str]:
    """The paths given as arguments, then those of --list. Raises BadInputError where there are none."""
    given = list(args.images)
    if args.list:
        try:
            lines = Path(args.list).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise BadInputError(
                f"cannot read --list {args.list}: {getattr(error, 'strerror', None) or error}"
            ) from error
        given += [line for line in lines if line.strip()]
    if not given:
        raise BadInputError(f"no path in {args.list}" if args.list else "no images: name files, folders or --list")
    return given
