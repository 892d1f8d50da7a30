"""Images one after the other: each that can be read is done, each that cannot is named with the cause."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import AiluRusError

if TYPE_CHECKING:
    from ..evaluation.loading import LoadedModel

Item = TypeVar("Item")


class FailedImageError(AiluRusError):
    """An image failed, and with --strict that ends the command."""

    exit_code = 1


class Batch:
    """The images of a command.

    images: those that are not known to fail. Headers are read at once, so that a file that holds no image is told
        before a model is loaded.
    names: for each image the relative name of its results, without suffix.
    results, failed: one entry for each image that is done, {"image", …}, and for each that failed, {"image", "error"}.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        from ..evaluation.folders import find_images, result_names, subfolders
        from ..images import READING_ERRORS, Image, why

        self.command, self.strict, self.json = args.command, args.strict, args.json
        self.names = result_names(args.images, args.recursive)
        self.results: list[dict[str, Any]] = []
        self.failed: list[dict[str, str]] = []
        self.images: list[Path] = []
        if not args.recursive and (left_out := subfolders(args.images)):
            tell(f"{len(left_out)} subfolders are left out ({left_out[0]} …): --recursive looks into them")
        for path in find_images(args.images, args.recursive):
            try:
                with Image.open(path):
                    self.images.append(path)
            except READING_ERRORS as error:
                self.fail(path, f"{path} is not a readable image: {why(error, path)}")

    def run(self, work: Callable[[Path], dict[str, Any]], show: Callable[[dict[str, Any]], str | None]) -> None:
        """Does the work for each image.

        Args:
            work: from an image's path to its entry in `results`.
            show: from that entry to the line that is printed (None: nothing is) where JSON was not asked for.

        Raises:
            WritingError: a result cannot be written, which would be so for the next one too.
            FailedImageError: an image failed, with --strict.
        """
        from ..evaluation.writing import WritingError

        try:
            for path in progress(self.images):
                try:
                    result = {"image": str(path), **work(path)}
                except WritingError:
                    raise
                except Exception as error:  # processors and models refuse an image in as many ways as there are of them
                    own = isinstance(error, AiluRusError)
                    self.fail(path, str(error) if own else f"{path}: {type(error).__name__}: {error}")
                    continue
                self.results.append(result)
                if not self.json and (line := show(result)) is not None:
                    tell(line, sys.stdout)
        except BaseException as error:  # an interrupt, a signal, a full disk
            if not isinstance(error, (FailedImageError, BrokenPipeError)):
                tell(self._summary())
            raise

    def fail(self, path: Path, reason: str) -> None:
        """Names an image that failed. Raises FailedImageError with --strict."""
        reason = " ".join(reason.split())
        if path.name not in reason:
            reason = f"{path}: {reason}"
        if self.strict:
            raise FailedImageError(reason)
        self.failed.append({"image": str(path), "error": reason})
        tell(f"ailurus-hf {self.command}: error: {reason}")

    def finish(self, loaded: LoadedModel | None, **fields: Any) -> int:
        """Prints the JSON, if it was asked for, and what was done; returns the exit code.

        Args:
            loaded: the model that ran; None where no image was left to run it on.
            fields: what the JSON tells beside the model and the images that failed.
        """
        if self.json:
            print_json(loaded, **fields, failed=self.failed)
        if self.failed and len(self.names) > 1:
            tell(self._summary())
        return 1 if self.failed else 0

    def _summary(self) -> str:
        left = len(self.names) - len(self.results) - len(self.failed)
        return f"{len(self.results)} done, {len(self.failed)} failed" + (f", {left} not begun" if left else "")


def progress(items: Sequence[Item]) -> Iterable[Item]:
    """The items, with a bar on stderr where they take more than two seconds and someone is watching."""
    from tqdm import tqdm

    return tqdm(items, delay=2, disable=None, leave=False, unit="image")


def tell(line: str, file: Any = None) -> None:
    """A line on stderr, or on another file, above the bar where there is one."""
    from tqdm import tqdm

    tqdm.write(line, file=file or sys.stderr)


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
