"""Result files: whole under their name, or not there at all; none replaces another that nobody gave up."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, Literal

from ..errors import AiluRusError
from .bad_input import BadInputError

if TYPE_CHECKING:
    from PIL import Image

# What a result is marked with: the settings that made it, as JSON. A PNG carries it as a text.
MARK = "ailurus-hf"
Existing = Literal["refuse", "overwrite", "resume"]


class WritingError(AiluRusError):
    """A result cannot be written, and the next one could not either: no room, no right."""


def make_folder(path: str | Path) -> Path:
    """The folder, made where it is missing. Raises WritingError where nothing could be written into it."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise WritingError(f"cannot write to folder {path}: {error.strerror}") from error
    return Path(path)


def save_picture(picture: Image.Image, path: Path, settings: Mapping[str, Any] | None = None) -> None:
    """Writes a picture under a temporary name beside `path` and renames it.

    Args:
        settings: what a PNG is marked with, see `MARK`.

    Raises:
        WritingError: no room or no right; AiluRusError: this name alone is too long.
    """
    options: dict[str, Any] = {}
    if settings is not None and path.suffix.lower() == ".png":
        from PIL.PngImagePlugin import PngInfo

        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text(MARK, json.dumps(settings))
    with _whole(path) as part:
        picture.save(part, **options)


def save_text(text: str, path: Path) -> None:
    """Writes a text file in the same way. Raises as `save_picture`."""
    with _whole(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    part = path.with_name(f".ailurus-{platform.node()}-{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        kind = AiluRusError if error.errno == errno.ENAMETOOLONG else WritingError
        raise kind(f"cannot write {path}: {error.strerror or error}") from error


def as_read_again(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back, without tuples."""
    read: dict[str, Any] = json.loads(json.dumps(settings))
    return read


def check_mark(file: Path, mark: str | None, settings: Mapping[str, Any]) -> None:
    """Raises where a file has other settings than these, or none: it is no result of this call.

    Args:
        file: for the message.
        mark: what the file is marked with, see `MARK`; None: it is not.
        settings: of this call, `as_read_again`.

    Raises:
        BadInputError: naming the first setting that is another one.
    """
    try:
        theirs = json.loads(mark or "null")
    except ValueError:
        theirs = None
    if not isinstance(theirs, dict):
        raise BadInputError(f"{file} is no result of this command: --resume would leave it; choose another --output")
    if theirs != settings:
        every = sorted({*theirs, *settings})
        name = next(name for name in every if theirs.get(name) != settings.get(name))
        raise BadInputError(
            f"{file} was made with {name} {theirs.get(name)}, not {settings.get(name)}: --resume goes on with the same "
            "settings; --overwrite makes all again"
        )


class ResultFolder:
    """The folder that a command writes its results to, and what becomes of results that are there already.

    Args:
        path: the folder; made where it is missing.
        endings: of an image's results, such as "_labels.png": its name comes before. The last is written last.
        existing: "refuse" results that are there, "overwrite" them, or "resume": an image whose results are all there
            is done.
        settings: what makes the results; those that other settings made are no reason to skip an image.
        together: names of files that hold something of all images.

    Raises:
        WritingError: nothing can be written there.
    """

    def __init__(
        self,
        path: str | Path,
        endings: Sequence[str],
        existing: Existing,
        settings: Mapping[str, Any],
        together: Sequence[str] = (),
    ) -> None:
        self.together = tuple(together)
        self.path, self.endings, self.existing = make_folder(path), tuple(endings), existing
        self.settings = as_read_again(settings)
        if existing == "resume":
            self._remove_leftovers()

    def files(self, name: Path) -> list[Path]:
        """Where the results of the image of that name go."""
        whole = self.path / name
        return [whole.with_name(whole.name + ending) for ending in self.endings]

    def check(self, names: Iterable[Path], inputs: Iterable[Path]) -> set[Path]:
        """Looks for results before anything is computed; returns the names that are done, none but with "resume".

        Args:
            names: of all images that will have results.
            inputs: files that are read: no result may take their place.

        Raises:
            BadInputError: a result would replace a file that may not be replaced.
        """
        read = {file.resolve() for file in inputs}
        there: list[Path] = []
        done = set()
        for name in names:
            files = self.files(name)
            if taken := [file for file in files if file.resolve() in read]:
                raise BadInputError(f"{taken[0]} is read as an image and would be replaced: choose another --output")
            found = [file for file in files if _exists(file)]
            if self.existing == "resume":
                self._check_ours(found)
                if len(found) == len(files):
                    done.add(name)
            there += found
        there += (together := [self.path / name for name in self.together if _exists(self.path / name)])
        if self.existing == "resume" and together and not done:
            raise BadInputError(f"{together[0]} is there, and no result of these images: choose another --output")
        if there and self.existing == "refuse":
            more = f" (and {len(there) - 1} other results)" if len(there) > 1 else ""
            raise BadInputError(
                f"{there[0]} is there already{more}: --overwrite replaces results, --resume does what is missing, "
                "--output names another folder"
            )
        return done

    def save(self, picture: Image.Image, path: Path) -> None:
        """`save_picture`, marked with the settings."""
        save_picture(picture, path, self.settings)

    def _check_ours(self, found: Iterable[Path]) -> None:
        """Raises where a PNG has other settings than these, or none: it is no result of this call."""
        from PIL import Image

        for file in found:
            if file.suffix.lower() != ".png":
                continue
            try:
                with Image.open(file) as picture:
                    mark = picture.info.get(MARK)
            except (OSError, SyntaxError, ValueError):
                mark = None
            check_mark(file, mark, self.settings)

    def _remove_leftovers(self) -> None:
        """What processes of this machine left that were killed while they wrote."""
        if os.name != "posix":  # elsewhere a process cannot be asked whether it is there without ending it
            return
        pattern = re.compile(rf"\.ailurus-{re.escape(platform.node())}-(\d+)\.\w+")
        for file in self.path.rglob(".ailurus-*"):
            if (match := pattern.fullmatch(file.name)) and not is_running(int(match[1])):
                file.unlink(missing_ok=True)


class ResultLines:
    """A file of JSON lines, one a result, each written whole; what becomes of one that is there is as in ResultFolder.

    done: from an image to its result, of those that are in the file.

    Raises:
        WritingError: it cannot be written; BadInputError: it is there and may not be replaced, or holds something else.
    """

    def __init__(self, path: str | Path, existing: Existing, settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.settings = as_read_again(settings)
        self.done: dict[str, dict[str, Any]] = {}
        try:
            if self.path.is_dir():
                raise BadInputError(
                    f"{path} is a folder; the results need a file, such as {self.path / 'scores.jsonl'}"
                )
            if self.path.exists():
                if existing == "refuse":
                    raise BadInputError(
                        f"{path} is there already: --overwrite replaces it, --resume does what is missing, --output "
                        "names another file"
                    )
                if existing == "resume":
                    self._read()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a" if existing == "resume" else "w", encoding="utf-8"):
                pass
        except OSError as error:
            raise WritingError(f"cannot write {path}: {error.strerror}") from error

    def add(self, result: Mapping[str, Any]) -> None:
        """Appends the result of an image. Raises WritingError."""
        line = json.dumps({**result, "settings": self.settings}) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise WritingError(f"cannot write {self.path}: {error.strerror or error}") from error
        self.done[result["image"]] = dict(result)

    def put_in_order(self, images: Sequence[str]) -> None:
        """The lines in the order of the images; those of others stay before them. Raises as `save_text`."""
        place = {image: number for number, image in enumerate(images)}
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        ordered = sorted(lines, key=lambda line: place.get(json.loads(line)["image"], -1))
        if ordered != lines:
            save_text("".join(ordered), self.path)

    def _read(self) -> None:
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                result = json.loads(line)
                image, settings = result["image"], result["settings"]
            except (ValueError, KeyError, TypeError) as error:
                raise BadInputError(
                    f"line {number} of {self.path} is no result of this command: choose another --output"
                ) from error
            if settings != self.settings:
                raise BadInputError(
                    f"line {number} of {self.path} was made with {settings}, not {self.settings}: --resume goes on "
                    "with the same settings"
                )
            self.done[image] = result
        if whole != text:  # the last line of a process that was killed
            with self.path.open("r+b") as file:
                file.truncate(len(whole))


def _exists(file: Path) -> bool:
    try:
        return file.exists() or file.is_symlink()
    except OSError:  # too long a name: writing says so, of that image
        return False


def is_running(pid: int) -> bool:
    """Whether a process of this machine is there (on POSIX)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
