"""Fine-tuning with and without reduction, from finished runs of examples/finetune_segmentation.py: tables 5 and 6.

    python -m benchmarks.training.finetune_quality runs/finetune-plain runs/finetune-0.25 runs/finetune-0.36

mIoU at the end of training, means over runs that differ only in their seeds, and the time of the fastest of them.
"lost" is against the plain runs of the same seeds, which see the same batches. "mIoU, plain" is that of the same
weights with the reduction taken off again. Runs follow one another and do not take turns: the time of a training step,
in turns, is what benchmarks.training.finetune_speed has.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from pathlib import Path
from typing import Any

import torch

from ..harness import environment, markdown, save
from .seeds import mean_behind, spread

COLUMNS = {
    "method": "method",
    "location": "L",
    "keep_ratio": "keep",
    "epochs": "epochs|{:g}",
    "lr": "lr|{:g}",
    "runs": "runs",
    "seconds": "training|{:.1f} s",
    "share_of_plain": "of plain|{:.3f}",
    "miou": "mIoU|{:.2f}",
    "spread": "spread|{:.2f}",
    "lost": "lost|{:+.2f}",
    "plain_miou": "mIoU, plain|{:.2f}",
    "plain_lost": "lost, plain|{:+.2f}",
}
# In what the runs of one row may differ.
OF_A_RUN = ("data", "output", "resume", "seed")


def gathered(folders: list[Path]) -> list[dict[str, Any]]:
    """A row for each way of training, means over its runs, plain first; the others are compared with it.

    spread: the best mIoU of a row's runs less the worst, None of one run.
    """
    ways: dict[tuple, list[dict[str, Any]]] = {}
    for folder in folders:
        metrics = json.loads((folder / "metrics.json").read_text())
        args = metrics["args"]
        row = _row(args, metrics["reduced"], metrics["plain"], sum(metrics["seconds_per_epoch"]))
        # An option that is off is as one that the script did not have yet.
        settings = tuple(sorted((key, value) for key, value in args.items() if value and key not in OF_A_RUN))
        ways.setdefault((row["method"], settings), []).append(row)
    plain = {run["seed"]: run["miou"] for runs in ways.values() for run in runs if run["method"] == "plain"}
    rows = [_of_way(runs, plain) for runs in ways.values()]
    rows.sort(key=lambda row: row["method"] != "plain")
    if rows[0]["method"] == "plain":
        for row in rows:
            row["share_of_plain"] = row["seconds"] / rows[0]["seconds"]
    return rows


def _row(args: dict[str, Any], reduced: dict | None, plain: dict, seconds: float) -> dict[str, Any]:
    is_reduced = reduced is not None
    return {
        "method": f"{args['clustering']}, {args['restore']}" if is_reduced else "plain",
        "location": args["location"] if is_reduced else None,
        "keep_ratio": args["keep"] if is_reduced else None,
        "epochs": args["epochs"],
        "lr": args["lr"],
        "precision": args["precision"],
        "seed": args["seed"],
        "seconds": seconds,
        "miou": (reduced or plain)["miou"],
        "plain_miou": plain["miou"] if is_reduced else None,
    }


def _of_way(runs: list[dict[str, Any]], plain: dict[int, float]) -> dict[str, Any]:
    """One row of the runs that differ in their seeds; plain: mIoU of the plain run of each seed."""
    scores = [run["miou"] for run in runs]
    row = {**runs[0], "runs": len(runs), "seconds": min(run["seconds"] for run in runs)}
    row["spread"] = spread(scores)
    row["seed"] = [run["seed"] for run in runs]
    for key, lost in (("miou", "lost"), ("plain_miou", "plain_lost")):
        row[lost] = None
        if row[key] is not None:
            row[key] = statistics.fmean(run[key] for run in runs)
            row[lost] = mean_behind(plain, ((run["seed"], run[key]) for run in runs))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="their --output folders")
    parser.add_argument("--name", default="finetune_quality", help="of the result file")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = gathered(args.runs)
    save(args.name, rows, environment(torch.device("cpu"), rows[0]["precision"]))
    print(markdown(rows, COLUMNS))


if __name__ == "__main__":
    main()
