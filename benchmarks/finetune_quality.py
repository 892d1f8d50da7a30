"""Fine-tuning with and without reduction, from finished runs of examples/finetune_segmentation.py: tables 5 and 6.

    python -m benchmarks.finetune_quality runs/finetune-plain runs/finetune-0.25 runs/finetune-0.36

Time of training and mIoU at its end; "mIoU, plain" is that of the same weights with the reduction taken off again. Runs
follow one another and do not take turns: the time of a training step, in turns, is what benchmarks.finetune_speed has.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import torch

from .harness import environment, markdown, save

COLUMNS = {
    "method": "method",
    "location": "L",
    "keep_ratio": "keep",
    "epochs": "epochs|{:g}",
    "seconds": "training|{:.1f} s",
    "share_of_plain": "of plain|{:.3f}",
    "miou": "mIoU|{:.2f}",
    "lost": "lost|{:+.2f}",
    "plain_miou": "mIoU, plain|{:.2f}",
}


def gathered(folders: list[Path]) -> list[dict[str, Any]]:
    """A row a run, that without reduction first; the others are compared with it."""
    rows: list[dict[str, Any]] = []
    for folder in folders:
        metrics = json.loads((folder / "metrics.json").read_text())
        args, reduced = metrics["args"], metrics["reduced"]
        row = {
            "epochs": args["epochs"],
            "seconds": sum(metrics["seconds_per_epoch"]),
            "miou": (reduced or metrics["plain"])["miou"],
            "precision": args["precision"],
        }
        if reduced is None:
            rows.insert(0, {"method": "plain", **row})
        else:
            method = f"{args['clustering']}, {args['restore']}"
            places = {"location": args["location"], "keep_ratio": args["keep"], "plain_miou": metrics["plain"]["miou"]}
            rows.append({"method": method, **places, **row})
    plain = rows[0]
    if plain["method"] == "plain":
        for row in rows:
            row["share_of_plain"] = row["seconds"] / plain["seconds"]
            row["lost"] = plain["miou"] - row["miou"]
    return rows


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
