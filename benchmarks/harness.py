"""How everything here is measured: interleaved runs in one process, medians, and results that say what made them."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import logging
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

RESULTS = Path(__file__).parent / "results"
log = logging.getLogger("benchmarks")


def interleaved(
    contenders: dict[str, Callable[[int], Any]],
    repeats: int = 7,
    warmup: int = 2,
    device: torch.device | None = None,
    prepare: Callable[[str], Any] | None = None,
) -> dict[str, float]:
    """Median seconds of each contender, run in turn; each gets the number of the round, to take another image.

    prepare: called with a contender's name before its turn, not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(warmup + repeats):
        for name, run in contenders.items():
            if prepare is not None:
                prepare(name)
            _synchronize(device)
            start = time.perf_counter()
            run(round_number)
            _synchronize(device)
            if round_number >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def model_flops(run: Callable[[], Any]) -> int:
    """FLOPs of a call, counted by torch. Its counter does not know the CPU's fused attention, so that runs as products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        run()
    return counter.get_total_flops()


def _synchronize(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def environment(device: torch.device, precision: str) -> dict[str, Any]:
    """What a result file says of where its numbers come from."""
    versions = {}
    for package in ("torch", "transformers", "diffusers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "versions": versions,
        "date": datetime.date.today().isoformat(),
        "command": f"python -m benchmarks.{Path(sys.argv[0]).stem} {shlex.join(map(_without_folder, sys.argv[1:]))}".strip(),
    }


def cpu_name() -> str:
    """The processor's name and its number of cores."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} threads"


def _without_folder(argument: str) -> str:
    return Path(argument).name if Path(argument).is_absolute() else argument


def save(name: str, rows: Sequence[dict[str, Any]], about: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Writes rows and environment as results/NAME-DEVICE-PRECISION.json; returns the path."""
    kind = "cuda" if "NVIDIA" in about["device"] else "cpu"
    path = folder / f"{name}-{kind}-{about['precision']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "rows": list(rows)}, indent=1) + "\n")
    log.info("wrote %s", path)
    return path


def markdown(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> str:
    """A Markdown table; columns: from a row's key to a heading with the format, such as "speed-up|{:.2f}×"."""
    heads = [heading.split("|")[0] for heading in columns.values()]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in rows:
        cells = []
        for key, heading in columns.items():
            form = heading.partition("|")[2] or "{}"
            cells.append("–" if row.get(key) is None else form.format(row[key]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
