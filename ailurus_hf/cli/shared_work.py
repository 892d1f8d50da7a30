"""Several processes that share the images of one command, where a launcher started them: accelerate, torchrun, mpirun
or srun.

They meet in a folder of small files beside the results, and need nothing else: there is no process group in which one
that died could hold up the others. The first process (rank 0) checks the call and writes the plan, which images are to
be done. Each process does its share and writes a line for every image into its journal. The first one reads the
journals, tells all results in order, and notices who is gone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import AiluRusError
from ..evaluation.bad_input import BadInputError
from ..evaluation.writing import WritingError, is_running, save_text
from .arguments import result_settings
from .launchers import Place, launched

PATIENCE = 600.0  # seconds until a process that never came is given up
BEAT, SILENCE = 10.0, 180.0  # seconds between signs of life; and without one, until a process elsewhere counts as gone
POLL = 0.05


class ProcessError(AiluRusError):
    """A process that shares the work is gone, or has told the others to stop."""

    exit_code = 1


class Member(NamedTuple):
    """A process that has come. token: of this run alone; machine: equal where process numbers can be compared."""

    token: str
    machine: str
    host: str
    pid: int


def meeting_folder(output: str | Path, is_file: bool) -> Path:
    """Where the processes of a command meet: inside the folder of results, or beside the file of results."""
    path = Path(output)
    return path.with_name(f".ailurus-run-{path.name}") if is_file else path / ".ailurus-run"


class Meeting:
    """The processes that share a command's images, as one of them sees it.

    members: all that have come, by rank.

    Args:
        folder: where they meet, which all of them can write to.
        place: of this process.
        settings: that make the results: journals that a killed run left are of use with equal ones alone.

    Raises:
        ProcessError: not all have come in time.
        WritingError: nothing can be written there.
    """

    def __init__(self, folder: Path, place: Place, settings: Mapping[str, Any]) -> None:
        self.folder, self.place, self.rank, self.size = folder, place, place.rank, place.size
        self.settings = settings
        self.me = Member(uuid.uuid4().hex, _machine(), platform.node(), os.getpid())
        self._seen: dict[int, tuple[int, float]] = {}
        self._read_to: dict[int, int] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            _clear(folder)
        self.members = self._gather_members() if self.rank == 0 else self._join()
        self._write_journal({"settings": dict(settings)})
        threading.Thread(target=self._beat, daemon=True).start()

    @property
    def neighbors(self) -> list[int]:
        """The ranks on this machine, this one's among them."""
        return [rank for rank, member in enumerate(self.members) if member.machine == self.me.machine]

    def share(self, items: Sequence[Any], block: int, rank: int | None = None) -> list[Any]:
        """What a process, else this one, does of a list that all have: every n-th block of so many in a row."""
        rank = self.rank if rank is None else rank
        return [item for number, item in enumerate(items) if number // block % self.size == rank]

    def write_plan(self, images: Sequence[Path] | None, todo: Iterable[int] = ()) -> None:
        """By the first process: what is to be done of the images, by number; None: nothing, the command is over."""
        save_text(json.dumps({"images": images and _digest(images), "todo": list(todo)}), self._plan)

    def read_plan(self, images: Sequence[Path]) -> list[int] | None:
        """By the others: what is to be done; None where the command is over.

        Raises:
            BadInputError: this process sees other images than the first one.
            ProcessError: the first process is gone.
        """
        while not self._plan.exists():
            if self.is_gone(0) and not self._plan.exists():  # not written just before it ended
                raise ProcessError(f"{self.name(0)} ended before it said what is to be done")
            time.sleep(POLL)
        plan = json.loads(self._plan.read_text(encoding="utf-8"))
        if plan["images"] not in (None, _digest(images)):
            raise BadInputError(
                f"the {len(images)} images found here are not those that the first process finds: all have to see the "
                "same files under the same paths"
            )
        return None if plan["images"] is None else plan["todo"]

    def stop(self) -> None:
        """By the first process: nobody begins another image."""
        self._plan.unlink(missing_ok=True)

    def write(self, entry: Mapping[str, Any]) -> None:
        """Adds a line to the journal. Raises ProcessError where the first process has stopped the work."""
        self._write_journal(entry)
        if not self._plan.exists():
            raise ProcessError("the first process has ended the command")

    def end(self, own: Mapping[str, Any]) -> None:
        """By the others: their share is done. Raises ProcessError where nobody is there to tell it."""
        if self.is_gone(0):
            raise ProcessError(f"{self.name(0)} ended before the work was done; --resume does what is left")
        self._write_journal({"end": dict(own)})

    def gone(self, ended: Container[int]) -> list[str]:
        """The names of processes that have gone, but for those that ended as they should."""
        others = set(range(self.size)) - {self.rank}
        return [self.name(rank) for rank in sorted(others) if rank not in ended and self.is_gone(rank)]

    def read(self, rank: int) -> Iterator[dict[str, Any]]:
        """The lines of a journal that were not read before."""
        start = self._read_to.get(rank, 0)
        entries, self._read_to[rank] = _lines(self._journal(rank), start)
        yield from entries

    def is_gone(self, rank: int) -> bool:
        """Whether a process has ended: on this machine at once, on another one after a time without a sign of life."""
        member = self.members[rank]
        if member.machine == self.me.machine and os.name == "posix":
            return not is_running(member.pid)
        try:
            sign = self._hello(rank).stat().st_mtime_ns
        except OSError:
            sign = 0
        known, since = self._seen.setdefault(rank, (sign, time.monotonic()))
        if sign != known:
            self._seen[rank] = (sign, time.monotonic())
            return False
        return time.monotonic() - since > SILENCE

    def name(self, rank: int) -> str:
        """A process in words."""
        member = self.members[rank]
        return f"{Place(rank, self.size)} (process {member.pid} on {member.host})"

    @property
    def _plan(self) -> Path:
        return self.folder / "plan.json"

    def _hello(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.json"

    def _journal(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.jsonl"

    def _gather_members(self) -> list[Member]:
        """By the first process: waits for all. What earlier runs left is cleared by now, so each that comes is new."""
        found = {0: self.me}
        save_text(json.dumps(self.me), self._hello(0))

        def all_there() -> bool:
            for rank in set(range(self.size)) - found.keys():
                if self._hello(rank).exists():
                    found[rank] = Member(*json.loads(self._hello(rank).read_text(encoding="utf-8")))
            return len(found) == self.size

        if not _wait(all_there):
            missing = ", ".join(str(rank) for rank in range(self.size) if rank not in found)
            raise ProcessError(f"of {self.size} processes, rank {missing} did not come within {PATIENCE:.0f} s")
        members = [found[rank] for rank in range(self.size)]
        save_text(json.dumps(members), self.folder / "members.json")
        return members

    def _join(self) -> list[Member]:
        """By the others: comes, again where the first process has cleared it away, until the first has seen it."""
        members: list[Member] = []

        def seen() -> bool:
            try:
                if not self._hello(self.rank).exists():
                    save_text(json.dumps(self.me), self._hello(self.rank))
                found = json.loads((self.folder / "members.json").read_text(encoding="utf-8"))
            except (FileNotFoundError, WritingError):  # cleared at this moment, or the first is not there yet
                return False
            members[:] = [Member(*each) for each in found]
            return self.me in members

        if not _wait(seen):
            raise ProcessError(f"the first process did not come within {PATIENCE:.0f} s")
        return members

    def _write_journal(self, entry: Mapping[str, Any]) -> None:
        path = self._journal(self.rank)
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise WritingError(f"cannot write {path}: {error.strerror or error}") from error

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT)
            try:
                os.utime(self._hello(self.rank))
            except OSError:  # the folder is removed: all is told
                return


def meet(args: argparse.Namespace, to_lines: bool) -> Meeting | None:
    """The processes that share a command's images; None where it is one alone. Raises BadInputError."""
    place = launched()
    if place.size == 1:
        return None
    if not args.output:
        raise BadInputError(f"{place.size} processes meet where results go: --output is needed")
    return Meeting(meeting_folder(args.output, to_lines), place, result_settings(args))


def left_results(folder: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Results in the journals of a run that was killed, made with these settings."""
    found = []
    for file in sorted([*folder.glob("left-*.jsonl"), *folder.glob("rank-*.jsonl")]):
        entries, _ = _lines(file, 0)
        if entries and entries[0].get("settings") == settings:
            found += [entry["result"] for entry in entries if "result" in entry]
    return found


def check_times(meeting: Meeting, device: str, labels: str | None) -> None:
    """For --compare: raises BadInputError where processes would spoil each other's times."""
    import torch

    crowd = max(Counter(member.machine for member in meeting.members).values())
    if crowd > 1 and not (device in ("auto", "cuda") and torch.cuda.device_count() >= crowd):
        raise BadInputError(
            f"--compare measures times, which {crowd} processes on one machine spoil for each other: run it in one "
            "process, or give each a machine or a GPU of its own"
        )
    if labels:
        raise BadInputError("--labels scores all images as one: run it in one process")


def device_for(name: str, neighbor: int) -> str:
    """The device of a process: where none is named, each on a machine has another GPU, as far as there are some.

    Args:
        name: as given.
        neighbor: which of the processes on its machine it is.
    """
    if name not in ("auto", "cuda"):
        return name
    if name == "auto" and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on"):
        return "cpu"  # accelerate launch --cpu
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{neighbor % count}" if count else name


def _clear(folder: Path) -> None:
    """Removes what an earlier run left, but for its journals: they hold results."""
    for file in folder.iterdir():
        if file.name.startswith("rank-") and file.suffix == ".jsonl":
            file.replace(folder / f"left-{uuid.uuid4().hex}.jsonl")
        elif not file.name.startswith("left-"):
            file.unlink(missing_ok=True)


def _wait(done: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(POLL)
    return True


def _lines(file: Path, start: int) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a journal from a byte on, and the byte after them."""
    try:
        with file.open("rb") as opened:
            opened.seek(start)
            text = opened.read()
    except FileNotFoundError:
        return [], start
    whole = text[: text.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines()], start + len(whole)


def _digest(images: Sequence[Path]) -> str:
    return sha256("\n".join(map(str, images)).encode("utf-8", "surrogateescape")).hexdigest()


def _machine() -> str:
    """Equal for processes that see each other's numbers: of one host, since it was started, in one container."""
    parts = [platform.node()]
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        try:
            parts.append(read())
        except OSError:
            continue
    return " ".join(parts)
