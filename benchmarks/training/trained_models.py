"""What the training scripts in examples/ made here: each run's model, settings, time, and score as it went.

    python -m benchmarks.training.trained_models "Segmenter Ti-like=run" "classifier=run-cifar"

Each is a name and the --output folder of examples/train_segmenter.py, train_classifier.py or finetune_segmentation.py,
with metrics.json and the best or last model in it. Scores are the runs' own, on the validation split.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..harness import environment, markdown, save

# As a run's own evaluation calls it, and in words.
SCORES = {"miou": "mIoU", "accuracy": "accuracy"}
COLUMNS = {
    "model": "model",
    "parameters": "parameters|{:.1f} M",
    "width": "wide",
    "images": "images seen",
    "minutes": "minutes|{:.0f}",
    "score": "score|{:.2f}",
    "score_name": "measure",
    "course": "on the way",
}


def gathered(name: str, run: Path) -> dict[str, Any]:
    """A run's row. history: every evaluation, of a run that was evaluated on its way."""
    metrics = json.loads((run / "metrics.json").read_text())
    args = metrics["args"]
    history = metrics.get("history") or [_fine_tuned(metrics)]
    score_name = next(key for key in SCORES if key in history[-1])
    folder = next(folder for folder in (run / "best", run / "model") if folder.is_dir())
    parameters, width = _size(folder)
    return {
        "model": name,
        "parameters": parameters / 1e6,
        "width": width,
        "images": history[-1].get("images"),
        "minutes": history[-1]["minutes"],
        "score": max(entry[score_name] for entry in history),
        "score_name": SCORES[score_name],
        "course": ", ".join(f"{entry[score_name]:.1f}" for entry in history[:-1]),
        "history": history,
        # Where the data lay is of no use to others.
        "settings": {key: value for key, value in args.items() if key not in ("data", "output", "init", "model")},
    }


def _fine_tuned(metrics: dict[str, Any]) -> dict[str, Any]:
    """A fine-tuning run's one evaluation, all tokens kept, in the form of the others."""
    return {**metrics["plain"], "minutes": sum(metrics["seconds_per_epoch"]) / 60}


def _size(folder: Path) -> tuple[int, int]:
    """Parameters of the weights in a folder, and the encoder's width."""
    with safe_open(folder / "model.safetensors", "pt") as weights:
        count = sum(torch.Size(weights.get_slice(key).get_shape()).numel() for key in weights.keys())  # noqa: SIM118
    config = json.loads((folder / "config.json").read_text())
    return count, config.get("encoder_config", config)["hidden_size"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--name", default="trained_models", help="of the result file")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = [gathered(name, Path(folder)) for name, folder in (run.split("=", 1) for run in args.runs)]
    save(args.name, rows, environment(torch.device("cpu"), "fp32"))
    print(markdown(rows, COLUMNS))


if __name__ == "__main__":
    main()
