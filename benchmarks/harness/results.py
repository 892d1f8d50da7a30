"""Result files: where they are, what they record (machine, versions, command), and their rows as a table."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ailurus_hf.evaluation.timing import markdown, measured_on

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of plain beside reduced: keys of rows and headings, as part of a benchmark's COLUMNS.
SPEED_COLUMNS = {
    "plain_ms": "plain|{:.0f} ms",
    "reduced_ms": "reduced|{:.0f} ms",
    "speed_up": "speed-up|{:.2f}×",
    "ideal": "FLOPs-ideal|{:.2f}×",
    "share_of_ideal": "share|{:.3f}",
}
log = logging.getLogger("benchmarks")


def measured_columns(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Rows under the headings of the benchmark that made them, where anything was measured."""
    return markdown(rows, {key: head for key, head in columns.items() if any(row.get(key) is not None for row in rows)})


def environment(device: torch.device, precision: str) -> dict[str, Any]:
    """What a result file says of where its numbers come from."""
    script = Path(sys.argv[0]).resolve()
    inside = script.relative_to(ROOT) if script.is_relative_to(ROOT) else Path("benchmarks", script.name)
    module = ".".join(inside.with_suffix("").parts)
    command = f"python -m {module} {shlex.join(map(_without_folder, sys.argv[1:]))}".strip()
    return {**measured_on(device, precision), "command": command}


def _without_folder(argument: str) -> str:
    return Path(argument).name if Path(argument).is_absolute() else argument


def device_folder(device: str) -> str:
    """The folder of a device's results: "cpu", or a GPU's name without its maker, as in "h100-80gb-hbm3"."""
    if device.endswith(" threads"):
        return "cpu"
    return "-".join(device.split(",")[0].replace("NVIDIA", "").lower().split())


def save(name: str, rows: Sequence[dict[str, Any]], about: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Writes rows and environment as results/DEVICE/NAME-PRECISION.json; returns the path."""
    path = folder / device_folder(about["device"]) / f"{name}-{about['precision']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "rows": list(rows)}, indent=1) + "\n")
    log.info("wrote %s", path)
    return path
