"""What every benchmark needs beside `ailurus_hf.measuring`: FLOPs, memory, and results that say what made them."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import logging
import platform
import resource
import shlex
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ailurus_hf.measuring import interleaved, markdown, wait_for

__all__ = ["RESULTS", "environment", "interleaved", "log", "markdown", "model_flops", "peak_bytes", "save"]

RESULTS = Path(__file__).parent / "results"
log = logging.getLogger("benchmarks")


def model_flops(run: Callable[[], Any]) -> int:
    """FLOPs of a call, counted by torch. Its counter does not know the CPU's fused attention, so that runs as products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        run()
    return counter.get_total_flops()


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Memory that a call needs at most beyond what was held before. On a CPU sampled every millisecond, on Linux only."""
    if device.type == "cuda":
        wait_for(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        wait_for(device)
        return torch.cuda.max_memory_allocated(device) - before
    pages = Path("/proc/self/statm")
    if not pages.exists():
        return None
    resident = lambda: int(pages.read_text().split()[1]) * resource.getpagesize()  # noqa: E731
    before, done = resident(), threading.Event()
    seen = [before]

    def sample() -> None:
        while not done.wait(0.001):
            seen.append(resident())

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        run()
    finally:
        done.set()
        sampler.join()
    return max(seen) - before


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
