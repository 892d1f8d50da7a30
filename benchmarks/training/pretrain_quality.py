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
from .seeds import mean_behind, spread

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
    scores: dict[str | None, dict[int, float]] = defaultdict(dict)
    images: dict[str | None, int] = {}
    for folder in folders:
        metrics = json.loads((folder / "metrics.json").read_text())
        init, last = metrics["args"]["init"], metrics["history"][-1]
        scores[init][metrics["args"]["seed"]], images[init] = last["miou"], last["images"]
    rows = {init: {**_of_pretraining(init), "images": images[init]} for init in scores}
    plain = next((scores[init] for init, row in rows.items() if row["pretraining"] == "plain"), {})
    for init, row in rows.items():
        values = list(scores[init].values())
        row |= {"runs": len(values), "seeds": list(scores[init])}
        row |= {"miou": statistics.fmean(values), "spread": spread(values)}
        row["behind"] = None if scores[init] is plain else mean_behind(plain, scores[init].items())
    return sorted(rows.values(), key=lambda row: row["pretraining"] != "plain")


def _of_pretraining(init: str | None) -> dict[str, Any]:
    if init is None:
        return {"pretraining": "none"}
    report = json.loads(Path(init, "pretraining.json").read_text())
    reduction = report["args"]["ailurus"]
    about = {"pretraining": "reduced" if reduction else "plain", "steps": report["steps"], "loss": report["loss"]}
    return {**about, **dict(zip(("location", "num_clusters"), reduction or (), strict=False))}


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
