"""Images in files and folders, their ground truth, and a name for the results of each."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..images import IMAGE_SUFFIXES, READING_ERRORS, ImageError, why
from .bad_input import BadInputError


def find_images(
    paths: Sequence[str | Path], recursive: bool = False, leave_out: str | Path | None = None
) -> list[Path]:
    """The files given, and the images in the folders given, in order of name; each once.

    Whatever a folder holds under the name of an image is among them, also what cannot be read: reading says so.

    Args:
        recursive: look into the folders' subfolders too.
        leave_out: a folder for results: what lies there is no input, unless it is given itself.

    Raises:
        BadInputError: a path that does not exist, or a folder without an image; or results would go into a folder that
            is given, and be taken for images the next time.
    """
    return list(_found(paths, recursive, leave_out))


def result_names(
    paths: Sequence[str | Path], recursive: bool = False, leave_out: str | Path | None = None
) -> dict[Path, Path]:
    """A relative name without suffix for the results of each image that `find_images` finds: no two are equal.

    It is the image's name, in subfolders its path from the folder given. Where two folders hold equal names, results
    lie in a subfolder for each folder; where two images of a folder differ in their suffix alone, it stays in the name.
    """
    found = _found(paths, recursive, leave_out)
    roots_of = defaultdict(set)
    for file, root in found.items():
        roots_of[_inside(file, root).with_suffix("")].add(root)
    clash = any(len(roots) > 1 for roots in roots_of.values())
    folders = _distinct_names(list(dict.fromkeys(found.values()))) if clash else defaultdict(Path)
    full = {file: folders[root] / _inside(file, root) for file, root in found.items()}
    names = {file: name.with_suffix("") for file, name in full.items()}
    while repeated := {name for name, times in Counter(names.values()).items() if times > 1}:
        names = {file: full[file] if name in repeated else name for file, name in names.items()}
    return names


def subfolders(paths: Sequence[str | Path]) -> list[Path]:
    """The subfolders of the folders given, which `find_images` leaves out unless it is recursive."""
    folders = [Path(path) for path in paths if Path(path).is_dir()]
    return [inner for folder in folders for inner in sorted(folder.iterdir()) if _is_subfolder(inner)]


def read_labels(image_path: Path, labels: str | Path, size: tuple[int, int], num_classes: int) -> np.ndarray:
    """The ground truth of an image, class ids, int64 [H, W].

    Args:
        labels: the file, or a folder that holds a PNG with the image's name.
        size: (width, height) of the image.
        num_classes: ids from 0 to num_classes - 1 are classes, others are unlabeled.

    Raises:
        ImageError: no such file, one that cannot be read or is of another size, or no class in it at all.
    """
    from PIL import Image

    path = Path(labels)
    if path.is_dir():
        path = path / f"{image_path.stem}.png"
    if not path.is_file():
        raise ImageError(f"no label map for {image_path.name}: no such file: {path}")
    try:
        with Image.open(path) as file:
            truth = np.asarray(file)
    except READING_ERRORS as error:
        raise ImageError(f"{path} is not a readable image: {why(error, path)}") from error
    if truth.shape != (size[1], size[0]):
        raise ImageError(
            f"{path} is {list(truth.shape)}, but {image_path.name} needs class ids of shape {[size[1], size[0]]}"
        )
    truth = truth.astype(np.int64)
    if not ((truth >= 0) & (truth < num_classes)).any():
        raise ImageError(
            f"no label in {path} is a class: its ids go from {truth.min()} to {truth.max()}, "
            f"the model's classes from 0 to {num_classes - 1}"
        )
    return truth


def _found(paths: Sequence[str | Path], recursive: bool, leave_out: str | Path | None) -> dict[Path, Path]:
    """Each file, and the folder that was given or the file's own."""
    results = None if leave_out is None else Path(leave_out).resolve()
    found: dict[Path, Path] = {}
    seen: set[Path] = set()
    for path in map(Path, paths):
        if path.is_dir():
            if path.resolve() == results:
                raise BadInputError(
                    f"images are read from {path} and results would be written there, to be taken for images the next "
                    "time: choose another --output"
                )
            inside = results is not None and path.resolve() in results.parents
            files = [
                f
                for f in _in_folder(path, recursive)
                if not (inside and results in (f.parent.resolve() / f.name).parents)
            ]
            if not files:
                inner = subfolders([path])
                hint = f"; it has {len(inner)} subfolders, which --recursive looks into" if inner else ""
                raise BadInputError(f"no image in folder {path}{hint}")
            root = path
        elif path.exists() or path.is_symlink():
            files, root = [path], path.parent
        else:
            raise BadInputError(f"no such file or folder: {path}")
        for file in files:
            if (real := file.parent.resolve() / file.name) not in seen:
                seen.add(real)
                found[file] = root
    return found


def _in_folder(folder: Path, recursive: bool) -> Iterator[Path]:
    inside = sorted(folder.iterdir())
    yield from (path for path in inside if path.suffix.lower() in IMAGE_SUFFIXES)
    if recursive:
        for path in filter(_is_subfolder, inside):
            yield from _in_folder(path, recursive)


def _is_subfolder(path: Path) -> bool:
    # A folder under an image's name is reported as an image that cannot be read; a link could lead in a circle.
    named_as_image = path.suffix.lower() in IMAGE_SUFFIXES
    return path.is_dir() and not (path.is_symlink() or named_as_image or path.name.startswith("."))


def _inside(file: Path, root: Path) -> Path:
    return file.relative_to(root)


def _distinct_names(roots: Sequence[Path]) -> dict[Path, Path]:
    """For each folder the last parts of its path: as many as it takes to tell it from the others."""
    parts = {root: root.resolve().parts for root in roots}
    length = 1
    while len({parts[root][-length:] for root in roots}) < len({parts[root] for root in roots}):
        length += 1
    return {root: Path(*parts[root][-length:]) for root in roots}
