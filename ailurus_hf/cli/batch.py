"""Images one after the other: each that can be read is done, each that cannot is named with the cause."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import AiluRusError

if TYPE_CHECKING:
    from ..evaluation.loading import LoadedModel
    from ..evaluation.writing import Existing, ResultFolder, ResultLines

# Options that decide nothing about a result.
NO_SETTINGS = {
    *("run", "images", "recursive", "strict", "output", "overwrite", "resume", "json", "json_lines"),
    *("device", "batch_size", "repeats"),
}

# What differs from run to run, and is not written down with a result.
TIMES = {"ms"}

Item = TypeVar("Item")


class FailedImageError(AiluRusError):
    """An image failed, and with --strict that ends the command."""

    exit_code = 1


class Batch:
    """The images of a command.

    images: those to do: not known to fail, and not done already. Headers are read at once, so that a file that holds no
        image is told before a model is loaded.
    names: for each image the relative name of its results, without suffix.
    results, failed: one entry for each image that is done, {"image", …}, and for each that failed, {"image", "error"}.
    skipped: images whose results were there already (--resume).
    folder: where results are written, for a command that has `endings`; lines: the file of results, where one is given.

    Args:
        args: of the command.
        endings: of an image's result files, as of `ResultFolder`.
        to_lines: --output is a file of JSON lines, and may be left out.
    """

    def __init__(self, args: argparse.Namespace, endings: Sequence[str] = (), to_lines: bool = False) -> None:
        from ..evaluation import writing
        from ..evaluation.folders import find_images, result_names, subfolders
        from ..images import READING_ERRORS, Image, why

        self.command, self.strict, self.json = args.command, args.strict, args.json
        self.json_lines = getattr(args, "json_lines", False)
        output = Path(args.output) if endings else None
        paths = find_images(args.images, args.recursive, leave_out=output)
        self.names = result_names(args.images, args.recursive, leave_out=output)
        self.results: list[dict[str, Any]] = []
        self.failed: list[dict[str, str]] = []
        self.skipped: list[Path] = []
        self.images: list[Path] = []
        self.folder: ResultFolder | None = None
        self.lines: ResultLines | None = None
        self._left = len(paths)
        if endings:
            self.folder = writing.ResultFolder(args.output, endings, existing(args), result_settings(args))
            done = self.folder.check(self.names.values(), paths)
            self.skipped = [path for path in paths if self.names[path] in done]
        elif to_lines and args.output:
            self.lines = writing.ResultLines(args.output, existing(args), result_settings(args))
            self.skipped = [path for path in paths if str(path) in self.lines.done]
        if not args.recursive and (left_out := subfolders(args.images)):
            tell(f"{len(left_out)} subfolders are left out ({left_out[0]} …): --recursive looks into them")
        skipped = set(self.skipped)
        for path in paths:
            if path in skipped:
                continue
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
        with self.told():
            for path in progress(self.images):
                self.attempt(path, work, show)

    def attempt(
        self, path: Path, work: Callable[[Path], dict[str, Any]], show: Callable[[dict[str, Any]], str | None]
    ) -> None:
        """Does the work for one image: its result, or the reason why it failed. As in `run`."""
        try:
            result = {"image": str(path), **work(path)}
        except Exception as error:
            self.fail_with(path, error)
            return
        self.results.append(result)
        if self.lines is not None:
            self.lines.add({name: value for name, value in result.items() if name not in TIMES})
        if self.json_lines:
            tell(json.dumps(result), sys.stdout)
        elif not self.json and (line := show(result)) is not None:
            tell(line, sys.stdout)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Says what is done where something ends the run: an interrupt, a signal, a full disk."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, (FailedImageError, BrokenPipeError)):
                tell(self._summary())
            raise

    @property
    def result_folder(self) -> ResultFolder:
        """The folder of results; there is one where endings were given."""
        assert self.folder is not None
        return self.folder

    def advise(self, lines: Iterable[str]) -> None:
        """Lines on stderr for people: what to think of the results."""
        if not (self.json or self.json_lines):
            for line in lines:
                tell(line)

    def say(self, line: str) -> None:
        """A line on stdout for people, where something was done."""
        if self.results and not (self.json or self.json_lines):
            tell(line, sys.stdout)

    def fail(self, path: Path, reason: str) -> None:
        """Names an image that failed. Raises FailedImageError with --strict."""
        reason = " ".join(reason.split())
        if path.name not in reason:
            reason = f"{path}: {reason}"
        if self.strict:
            raise FailedImageError(reason)
        self.failed.append({"image": str(path), "error": reason})
        tell(f"ailurus-hf {self.command}: error: {reason}")
        if self.json_lines:
            tell(json.dumps(self.failed[-1]), sys.stdout)

    def fail_with(self, path: Path, error: Exception) -> None:
        """Names an image that failed for this error. Raises errors that the next image would meet as well."""
        from ..evaluation.writing import WritingError

        if isinstance(error, (WritingError, FailedImageError)):
            raise error
        # Processors and models refuse an image in as many ways as there are of them.
        self.fail(path, str(error) if isinstance(error, AiluRusError) else f"{path}: {type(error).__name__}: {error}")

    def finish(self, loaded: LoadedModel | None, **fields: Any) -> int:
        """Prints the JSON, if it was asked for, and what was done; returns the exit code.

        Args:
            loaded: the model that ran; None where no image was left to run it on.
            fields: what the JSON tells beside the model and the images that failed.
        """
        if self.json_lines:
            pass
        elif self.json:
            skipped = {"skipped": [str(path) for path in self.skipped]} if self.skipped else {}
            print_json(loaded, **fields, **skipped, failed=self.failed)
        if (self.failed and len(self.names) > 1) or self.skipped:
            tell(self._summary())
        return 1 if self.failed else 0

    def _summary(self) -> str:
        left = self._left - len(self.results) - len(self.failed) - len(self.skipped)
        parts = [f"{len(self.results)} done"]
        parts += [f"{len(self.skipped)} skipped (their results are there)"] if self.skipped else []
        parts += [f"{len(self.failed)} failed"] + ([f"{left} not begun"] if left else [])
        return ", ".join(parts)


def existing(args: argparse.Namespace) -> Existing:
    """What becomes of results that are there already."""
    return "overwrite" if args.overwrite else "resume" if args.resume else "refuse"


def result_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options that decide what a result is: those that were given or have a default, but not where images come
    from, where results go, and how they are told."""
    from .arguments import read_config

    given = {k: v for k, v in sorted(vars(args).items()) if k not in NO_SETTINGS and v not in (None, False)}
    return {**given, "config": read_config(args.config)} if given.get("config") else given


def progress(items: Sequence[Item]) -> Iterable[Item]:
    """The items, with a bar on stderr where they take more than two seconds and someone is watching."""
    from tqdm import tqdm

    return tqdm(items, delay=2, disable=None, leave=False, unit="image")


def tell(line: str, file: Any = None) -> None:
    """A line on stderr, or on another file, above the bar where there is one."""
    from tqdm import tqdm

    tqdm.write(line, file=file or sys.stderr)
    (file or sys.stderr).flush()  # a reader behind a pipe sees each as it comes


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
