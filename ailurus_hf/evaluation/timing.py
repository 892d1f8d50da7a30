"""How speed is measured: contenders take turns, the device is waited for, and results record the machine."""

from __future__ import annotations

import datetime
import math
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..versions import installed_version

Name = TypeVar("Name", bound=Hashable)


def interleaved(
    contenders: Mapping[Name, Callable[[int], Any]],
    repeats: int = 7,
    warmup: int = 2,
    device: torch.device | None = None,
    around: Callable[[Name], AbstractContextManager] | None = None,
    progress: Callable[[range], Iterable[int]] = iter,
) -> dict[Name, float]:
    """Median seconds of each contender, run in turn; each gets the number of the round, to take another image.

    Taking turns spreads what else the machine does evenly over the contenders.
    around: a context for each contender's turn, to switch something on and off outside of what is timed.
    progress: what the rounds go through, such as a bar.
    """
    times: dict[Name, list[float]] = {name: [] for name in contenders}
    for round_number in progress(range(warmup + repeats)):
        for name, run in contenders.items():
            with around(name) if around is not None else nullcontext():
                wait_for(device)
                start = time.perf_counter()
                run(round_number)
                wait_for(device)
                seconds = time.perf_counter() - start
            if round_number >= warmup:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def wait_for(device: torch.device | None) -> None:
    """Until a GPU has done all that it was given; None and the CPU have nothing to wait for."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device is not None and device.type == "mps":
        torch.mps.synchronize()


def measured_on(device: torch.device, precision: str) -> dict[str, Any]:
    """Device, threads, versions and date, to be kept beside what was measured."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "versions": {name: installed_version(name) for name in ("torch", "transformers", "diffusers")},
        "date": datetime.date.today().isoformat(),
    }


def cpu_name() -> str:
    """The processor's name and its number of cores."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} threads"


def markdown(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A Markdown table; columns: from a row's key to a heading with the format, such as "speed-up|{:.2f}×"."""
    heads = [heading.split("|")[0] for heading in columns.values()]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in rows:
        cells = []
        for key, heading in columns.items():
            value, form = row.get(key), heading.partition("|")[2] or "{}"
            unknown = value is None or (isinstance(value, float) and math.isnan(value))
            cells.append("–" if unknown else form.format(value))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
