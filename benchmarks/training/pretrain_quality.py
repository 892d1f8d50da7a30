"""What masked pretraining on representatives is worth: finished runs of examples/train_segmenter.py that began from it.

    python -m benchmarks.training.pretrain_quality runs/from-plain runs/from-plain-1 runs/from-reduced runs/from-nothing

The runs' --init is a folder of examples/pretrain_masked.py (or none). mIoU is that of the last evaluation, means over
runs that began from the same folder and differ in their seeds; "behind" is what they have less than those of the same
seeds that began from plain pretraining. Times are not of turns: benchmarks.training.pretrain_speed has those.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from ..harness import environment, markdown, save

COLUMNS = {
    "pretraining": "pretraining",
    "location": "L",
    "num_clusters": "M",
    "steps": "steps",
    "loss": "its loss|{:.3f}",
    "images": "then images",
    "runs": "runs",
    "miou": "mIoU|{:.2f}",
    "spread": "spread|{:.2f}",
    "behind": "behind|{:+.2f}",
}


def gathered(folders: list[Path]) -> list[dict[str, Any]]:
    """A row for each folder that runs began from, plain first."""
    runs: dict[str | None, dict[int, dict[str, Any]]] = defaultdict(dict)
    for folder in folders:
        metrics = json.loads((folder / "metrics.json").read_text())
        runs[metrics["args"]["init"]][metrics["args"]["seed"]] = metrics["history"][-1]
    rows = [{**_of_pretraining(init), **_of_runs(of_seed)} for init, of_seed in runs.items()]
    plain = next((of_seed for row, of_seed in zip(rows, runs.values(), strict=True) if _is_plain(row)), {})
    for row, of_seed in zip(rows, runs.values(), strict=True):
        behind = [plain[seed]["miou"] - run["miou"] for seed, run in of_seed.items() if seed in plain]
        row["behind"] = statistics.fmean(behind) if behind and not _is_plain(row) else None
    return sorted(rows, key=lambda row: not _is_plain(row))


def _is_plain(row: dict[str, Any]) -> bool:
    return row["pretraining"] == "plain"


def _of_pretraining(init: str | None) -> dict[str, Any]:
    if init is None:
        return {"pretraining": "none"}
    report = json.loads(Path(init, "pretraining.json").read_text())
    reduction = report["args"]["ailurus"]
    about = {"pretraining": "reduced" if reduction else "plain", "steps": report["steps"], "loss": report["loss"]}
    return {**about, **dict(zip(("location", "num_clusters"), reduction or (), strict=False))}


def _of_runs(of_seed: dict[int, dict[str, Any]]) -> dict[str, Any]:
    scores = [run["miou"] for run in of_seed.values()]
    return {
        "images": next(iter(of_seed.values()))["images"],
        "runs": len(scores),
        "seeds": list(of_seed),
        "miou": statistics.fmean(scores),
        "spread": max(scores) - min(scores) if len(scores) > 1 else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="their --output folders")
    parser.add_argument("--name", default="pretrain_quality", help="of the result file")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = gathered(args.runs)
    save(args.name, rows, environment(torch.device("cpu"), "bf16"))
    print(markdown(rows, COLUMNS))


if __name__ == "__main__":
    main()
