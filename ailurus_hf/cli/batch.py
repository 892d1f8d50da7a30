"""Images one after the other: each that can be read is done, each that cannot is named with the cause."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AiluRusError
from .telling import print_json, progress, reason_of, tell

if TYPE_CHECKING:
    from ..evaluation.loading import LoadedModel
    from ..evaluation.writing import ResultFolder, ResultLines

Show = Callable[[dict[str, Any]], "str | None"]

# What differs from run to run, and is not written down with a result.
TIMES = {"ms"}


class FailedImageError(AiluRusError):
    """An image failed, and with --strict that ends the command."""

    exit_code = 1


class Batch:
    """The images of a command.

    Where a launcher started several processes, each has its share of them, and the first one tells the results of all.

    todo: the images to do, of all processes: not known to fail, and not done already. Headers are read at once, so that
        a file that holds no image is told before a model is loaded.
    images: those of them that this process does.
    names: for each image the relative name of its results, without suffix; read: gives the image of a path.
    results, failed: one entry for each image that is done, {"image", …}, and for each that failed, {"image", "error"}.
    skipped: images whose results were there already (--resume).
    folder: where results are written, for a command that has `endings`; lines: the file of results, where one is given.
    device: the name of the device to load the model to.
    write_together: a command's own; called when all images are done, by the process that tells the results.

    Args:
        args: of the command.
        endings: of an image's result files, as of `ResultFolder`.
        to_lines: --output is a file of JSON lines, and may be left out.
        together: as of `ResultFolder`.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        endings: Sequence[str] = (),
        to_lines: bool = False,
        together: Sequence[str] = (),
    ) -> None:
        from ..evaluation import writing
        from .arguments import existing, result_settings
        from .shared_work import device_for, meet, meeting_folder
        from .sources import find_source

        self.command, self.strict, self.json = args.command, args.strict, args.json
        self.json_lines = getattr(args, "json_lines", False)
        self._source = find_source(args, Path(args.output) if endings else None)
        paths, self.names, self.read = self._source.paths, self._source.names, self._source.read
        self.results: list[dict[str, Any]] = []
        self.failed: list[dict[str, str]] = []
        self.skipped: list[Path] = []
        self.todo: list[Path] = []
        self.folder: ResultFolder | None = None
        self.lines: ResultLines | None = None
        self.lost: list[str] = []
        self.show: Show = lambda result: None
        self.write_together: Callable[[], None] = lambda: None
        self.meeting = meet(args, to_lines) if endings or to_lines else None
        self._meeting_folder = meeting_folder(args.output, to_lines) if (endings or to_lines) and args.output else None
        self._block = getattr(args, "batch_size", 1)
        self._paths = paths
        self._ends: dict[int, dict[str, Any]] = {}
        self._gathered = False
        # What is known of images and not told yet: it waits for the images before.
        self._waiting: dict[str, dict[str, Any]] = {}
        self._told = 0
        if endings:
            self.folder = writing.ResultFolder(args.output, endings, existing(args), result_settings(args), together)
        neighbor = self.meeting.neighbors.index(self.meeting.rank) if self.meeting else 0
        self.device = device_for(args.device, neighbor)
        if self.meeting is not None and self.meeting.rank:
            plan = self.meeting.read_plan(paths)
            self._gathered = plan is None  # the command is over: nobody waits for this process
            self.todo = [paths[number] for number in plan or ()]
        else:
            with self._leading():
                if left_out := self._source.left_out:
                    tell(f"{len(left_out)} subfolders are left out ({left_out[0]} …): --recursive looks into them")
                self._check(args, to_lines)
        self.images = self.meeting.share(self.todo, self._block) if self.meeting else self.todo

    def _check(self, args: argparse.Namespace, to_lines: bool) -> None:
        """What there is to do, by the process that decides it."""
        from ..evaluation.writing import ResultLines
        from ..images import READING_ERRORS, why
        from .arguments import existing, result_settings
        from .shared_work import check_times, left_results, meeting_folder

        if self.meeting is not None and getattr(args, "compare", False):
            check_times(self.meeting, args.device, args.labels)
        if self.folder is not None:
            done = self.folder.check(self.names.values(), self._paths)
            self.skipped = [path for path in self._paths if self.names[path] in done]
        elif to_lines and args.output:
            self.lines = ResultLines(args.output, existing(args), result_settings(args))
            if args.resume:
                for result in left_results(meeting_folder(args.output, True), self.lines.settings):
                    self._add_line(result)
            self.skipped = [path for path in self._paths if str(path) in self.lines.done]
        skipped = set(self.skipped)
        for path in self._paths:
            if path in skipped:
                continue
            try:
                self._source.check(path)
                self.todo.append(path)
            except READING_ERRORS as error:
                self._tell_failed(path, _named(path, f"{path} is not a readable image: {why(error, path)}"))

    @contextmanager
    def _leading(self) -> Iterator[None]:
        """Around what the first process decides: the others hear of it, or that there is nothing to do."""
        if self.meeting is None:
            yield
            return
        try:
            yield
        except BaseException:
            self.meeting.write_plan(None)
            raise
        todo = set(self.todo)
        self.meeting.write_plan(self._paths, [number for number, path in enumerate(self._paths) if path in todo])

    def run(self, work: Callable[[Path], dict[str, Any]], show: Show) -> None:
        """Does the work for each image.

        Args:
            work: from an image's path to its entry in `results`.
            show: from that entry to the line that is printed (None: nothing is) where JSON was not asked for.

        Raises:
            WritingError: a result cannot be written, which would be so for the next one too.
            FailedImageError: an image failed, with --strict.
            ProcessError: the first process has stopped the work.
        """
        self.show = show
        with self.told():
            for path in progress(self.images):
                self.attempt(path, work)

    def attempt(self, path: Path, work: Callable[[Path], dict[str, Any]]) -> None:
        """Does the work for one image: its result, or the reason why it failed. As in `run`, with `show` set."""
        try:
            result = {"image": str(path), **work(path)}
        except Exception as error:
            self.fail_with(path, error)
            return
        self._deliver(str(path), {"result": result})

    def fail(self, path: Path, reason: str) -> None:
        """Names an image that failed. Raises FailedImageError with --strict."""
        self._deliver(str(path), {"error": _named(path, reason)})

    def fail_with(self, path: Path, error: Exception) -> None:
        """Names an image that failed for this error. Raises errors that the next image would meet as well."""
        from ..evaluation.rows import EndOfRowsError
        from ..evaluation.writing import WritingError
        from .shared_work import ProcessError

        if isinstance(error, (WritingError, FailedImageError, ProcessError, EndOfRowsError)):
            raise error
        self.fail(path, reason_of(path, error))

    def gather(self, own: dict[str, Any]) -> list[dict[str, Any]] | None:
        """Waits until all processes are done, or gone, and tells what they did.

        Args:
            own: what this process has to say of its share, for JSON.

        Returns:
            What each says; None where this is not the first process: it is done.
        """
        self._gathered = True
        if self.meeting is None:
            return [own]
        if self.meeting.rank:
            self.meeting.end(own)
            return None
        with self.told():
            waiting = set(range(1, self.meeting.size))
            while waiting:
                # Looked at before its journal is read: what it wrote last is in there.
                gone = {rank for rank in waiting if self.meeting.is_gone(rank)}
                self._collect()
                self._tell_in_order()
                waiting -= self._ends.keys()
                for rank in waiting & gone:
                    self._lose(rank)
                waiting -= gone
                if waiting:
                    time.sleep(0.1)
            self._tell_in_order(leave_gaps=True)
        return [own, *(self._ends[rank] for rank in sorted(self._ends))]

    @contextmanager
    def told(self) -> Iterator[None]:
        """Says what is done where something ends the run: an interrupt, a signal, a full disk; and who is gone."""
        try:
            yield
        except BaseException as error:
            if self.meeting is not None and self.meeting.rank == 0:
                self.meeting.stop()
                self._collect()
            if not isinstance(error, (FailedImageError, BrokenPipeError)):
                tell(self._summary())
                for who in self.meeting.gone(self._ends) if self.meeting is not None else ():
                    tell(f"{who} ended before its share was done")
            raise

    def _deliver(self, image: str, entry: dict[str, Any]) -> None:
        """Of an image of this process: tells its result or error, or hands it to the first process."""
        if self.meeting is None or not self.meeting.rank:
            self._take(image, entry)
            self._collect()
            self._tell_in_order()
            return
        if "result" in entry:
            self.results.append(entry["result"])
        else:
            self.failed.append({"image": image, "error": entry["error"]})
        self.meeting.write({"image": image, **entry})

    def _take(self, image: str, entry: dict[str, Any]) -> None:
        self._waiting[image] = entry
        if "result" in entry:
            self._add_line(entry["result"])

    def _collect(self) -> None:
        """What the other processes have written since."""
        if self.meeting is None:
            return
        for rank in range(1, self.meeting.size):
            for entry in self.meeting.read(rank):
                if "image" in entry:
                    self._take(entry["image"], entry)
                elif "end" in entry:
                    self._ends[rank] = entry["end"]

    def _tell_in_order(self, leave_gaps: bool = False) -> None:
        """Tells what waits, as far as all before it is there."""
        while self._told < len(self.todo):
            image = str(self.todo[self._told])
            if image not in self._waiting and not leave_gaps:
                return
            self._told += 1
            entry = self._waiting.pop(image, {})
            if "error" in entry:
                self._tell_failed(Path(image), entry["error"])
            elif entry:
                self._tell_result(entry["result"])

    def _tell_result(self, result: dict[str, Any]) -> None:
        self.results.append(result)
        if self.json_lines:
            tell(json.dumps(result), sys.stdout)
        elif not self.json and (line := self.show(result)) is not None:
            tell(line, sys.stdout)

    def _tell_failed(self, path: Path, reason: str) -> None:
        if self.strict:
            raise FailedImageError(reason)
        self.failed.append({"image": str(path), "error": reason})
        tell(f"ailurus-hf {self.command}: error: {reason}")
        if self.json_lines:
            tell(json.dumps(self.failed[-1]), sys.stdout)

    def _add_line(self, result: dict[str, Any]) -> None:
        if self.lines is not None and result["image"] not in self.lines.done:
            self.lines.add({name: value for name, value in result.items() if name not in TIMES})

    def _lose(self, rank: int) -> None:
        """Names a process that is gone; the images that it did not do have failed."""
        assert self.meeting is not None
        share = self.meeting.share(self.todo, self._block, rank)
        known = self._waiting.keys() | {each["image"] for each in [*self.results, *self.failed]}
        left = [str(path) for path in share if str(path) not in known]
        reason = f"{self.meeting.name(rank)} ended before its share was done"
        self.failed += [{"image": image, "error": reason} for image in left]
        self.lost.append(reason)
        rest = f"{len(left)} of its {len(share)} images are left; --resume does them"
        tell(f"ailurus-hf {self.command}: error: {reason}: {rest}")

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

    def finish(self, loaded: LoadedModel | None, **fields: Any) -> int:
        """Prints the JSON, if it was asked for, and what was done; returns the exit code.

        Args:
            loaded: the model that ran; None where no image was left to run it on.
            fields: what the JSON tells beside the model and the images that failed.
        """
        if not self._gathered:
            self.gather({})
        if self.meeting is not None and self.meeting.rank:
            return 0  # the first process tells the rest
        if self.lines is not None:
            self.lines.put_in_order([str(path) for path in self._paths])
        self.write_together()
        if self._meeting_folder is not None:
            shutil.rmtree(self._meeting_folder, ignore_errors=True)
        if self.json_lines:
            pass
        elif self.json:
            skipped = {"skipped": [str(path) for path in self.skipped]} if self.skipped else {}
            print_json(loaded, **fields, **skipped, failed=self.failed)
        if (self.failed and len(self.names) > 1) or self.skipped:
            tell(self._summary())
        return 1 if self.failed or self.lost else 0

    def _summary(self) -> str:
        waiting = sum("result" in entry for entry in self._waiting.values())
        done, failed = len(self.results) + waiting, len(self.failed) + len(self._waiting) - waiting
        mine = len(self.images) if self.meeting is not None and self.meeting.rank else len(self._paths)
        left = mine - done - failed - len(self.skipped)
        parts = [f"{done} done"]
        parts += [f"{len(self.skipped)} skipped (their results are there)"] if self.skipped else []
        parts += [f"{failed} failed"] + ([f"{left} not begun"] if left else [])
        who = f"{self.meeting.place}: " if self.meeting is not None and self.meeting.rank else ""
        return who + ", ".join(parts)


def _named(path: Path, reason: str) -> str:
    """A reason in one line that names the image."""
    reason = " ".join(reason.split())
    return reason if path.name in reason else f"{path}: {reason}"
