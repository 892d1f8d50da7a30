"""A process that makes rows: where one fails, hangs or takes the process with it, a new process makes the next."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import re
import sys
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

import torch

from ..harness import environment, measured_columns
from .rows import Machine, Row
from .tiny import shrink

ROWS = "benchmarks.gpu.rows"
# A row may take so many times its minutes, and at least so long: then it hangs.
PATIENCE, LEAST_SECONDS = 4, 180
# An import of everything on a slow disk.
START_SECONDS = 600


class Worker:
    """Makes rows of `module.ROWS` on a device, in a process that is started when there is none.

    about: device and versions, as its process says.
    """

    def __init__(self, device: str, tiny: bool, module: str = ROWS) -> None:
        self.arguments = (device, tiny, module)
        self.about: dict[str, Any] = {}
        self._process: Any = None
        self._connection: Any = None

    def start(self) -> None:
        """Raises RuntimeError where the device is not there or the process ends."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, *self.arguments), daemon=False)
        self._process.start()
        theirs.close()
        said = self._answer(START_SECONDS)
        if "device" not in said:
            self.end()
            raise RuntimeError(said["why"])
        self.about = said

    def make(self, row: Row, seconds_left: float) -> dict[str, Any]:
        """What became of a row: "state", "why", "seconds", and of one that was measured "rows", "table", "about"."""
        begun, patience = time.monotonic(), max(PATIENCE * 60 * row.minutes, LEAST_SECONDS)
        if self._process is None:
            try:
                self.start()
            except RuntimeError as error:
                return {"state": "failed", "why": f"no new process: {error}", "seconds": time.monotonic() - begun}
        self._connection.send(row.key)
        made = self._answer(min(patience, seconds_left))
        if made["state"] == "hangs":
            over = seconds_left <= patience
            made = {"state": "no time", "why": "stopped at the end of the minutes"} if over else _hangs(patience)
        made["seconds"] = time.monotonic() - begun
        if made["state"] not in ("done", "left out"):
            self.end()  # on a GPU an error may stay with the process
        return made

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
        self._process = None

    def _answer(self, seconds: float) -> dict[str, Any]:
        try:
            if not self._connection.poll(seconds):
                return {"state": "hangs", "why": f"no answer in {seconds:.0f} s"}
            return self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            return {"state": "failed", "why": f"its process ended with exit code {self._process.exitcode}"}


def _hangs(seconds: float) -> dict[str, Any]:
    return {"state": "failed", "why": f"took longer than {seconds:.0f} seconds"}


def serve(connection: Connection, device: str, tiny: bool, module: str) -> None:
    """In the process: tells about the device, then makes each row that it is sent the key of."""
    try:
        machine = Machine(torch.device(device), tiny)
        torch.zeros(1, device=machine.device)
        if tiny:
            shrink()
        rows = importlib.import_module(module).ROWS
        connection.send(environment(machine.device, "all"))
    except Exception as error:  # whatever it is, nothing can be made
        connection.send({"state": "failed", "why": in_a_line(error)})
        return
    while True:
        try:
            key = connection.recv()
        except EOFError:  # the one who asks is gone
            return
        connection.send(made_here(rows[key], machine))


def made_here(row: Row, machine: Machine) -> dict[str, Any]:
    """A row, measured in this process."""
    if row.cuda and machine.device.type != "cuda":
        return {"state": "left out", "why": "only CUDA has this"}
    try:
        rows = row.measure(importlib.import_module(row.module), machine)
        table = measured_columns(rows, {key: finer(head) for key, head in row.columns.items()})
        wrong = row.wrong(rows)
    except ImportError as error:  # a library that is missing, or too old
        own = (error.name or "").split(".")[0] in ("benchmarks", "ailurus_hf")
        return {"state": "failed" if own else "left out", "why": in_a_line(error)}
    except Exception as error:
        traceback.print_exc()
        return {"state": "failed", "why": in_a_line(error)}
    finally:
        forget()
    about = environment(machine.device, row.precision)
    state = "failed" if wrong else "done"
    return {"state": state, "why": wrong or "", "rows": rows, "table": table, "about": about}


def forget() -> None:
    """What a row leaves behind: memory and compiled graphs."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def finer(head: str) -> str:
    """A heading whose milliseconds are those of a GPU."""
    return head.replace("{:.0f} ms", "{:.2f} ms")


def in_a_line(error: BaseException) -> str:
    """Its type and first line, without folders of the machine."""
    first = (str(error).strip().splitlines() or [""])[0]
    return re.sub(r"(?<!\w)/\S*/", "", f"{type(error).__name__}: {first}")[:300]
