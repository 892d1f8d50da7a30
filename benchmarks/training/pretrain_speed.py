"""Time of masked pretraining on representatives: examples/pretrain_masked.py, plain and with --ailurus, run in turns.

    python -m benchmarks.training.pretrain_speed --data CAMVID          # as wide as the shipped Segmenter, and twice
    python -m benchmarks.training.pretrain_speed --data CAMVID --widths 192 --reductions 2,24 --repeats 1

A step has its batch of windows read and augmented in it, the encoder on the visible patches and the decoder on all.
After layer 0 on one token nearly all of the encoder is gone: no reduction of the encoder can be faster.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..harness import ROOT, environment, log, markdown, save

SCRIPT = ROOT / "examples" / "pretrain_masked.py"
COLUMNS = {
    "width": "wide",
    "layers": "layers",
    "location": "L",
    "num_clusters": "M",
    "seconds": "training step|{:.3f} s",
    "share_of_plain": "of plain|{:.3f}",
}


def seconds_a_step(data: Path, steps: int, *options: str) -> float:
    """Of a run of its own."""
    with TemporaryDirectory() as folder:
        call = [str(SCRIPT), "--data", str(data), "--output", folder, "--masks", "cells", "--steps", str(steps)]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environ = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        subprocess.run([sys.executable, *call, *options], check=True, env=environ, stderr=subprocess.DEVNULL)
        report = json.loads(Path(folder, "pretraining.json").read_text())
    return 60 * report["minutes"] / report["steps"]


def measure(
    data: Path, widths: list[int], layers: int, reductions: list[str], steps: int, repeats: int
) -> list[dict[str, Any]]:
    """A row for each width plain, and one for each of its reductions "L,M"; medians over runs."""
    rows = []
    for width in widths:
        taken: dict[str, list[float]] = defaultdict(list)
        for _ in range(repeats):
            for reduction in ("", *reductions):
                more = ("--ailurus", reduction) if reduction else ()
                taken[reduction].append(
                    seconds_a_step(data, steps, "--width", str(width), "--layers", str(layers), *more)
                )
        plain = statistics.median(taken[""])
        for reduction, runs in taken.items():
            location, num_clusters = map(int, reduction.split(",")) if reduction else (None, None)
            seconds = statistics.median(runs)
            about = {"width": width, "layers": layers, "location": location, "num_clusters": num_clusters}
            rows.append({**about, "seconds": seconds, "share_of_plain": seconds / plain, "steps": steps})
            log.info("%d wide, %s: %.3f s a step", width, reduction or "plain", seconds)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CamVid folder")
    parser.add_argument("--widths", type=int, nargs="+", default=[192, 384])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--reductions", nargs="+", default=["2,24", "1,12", "0,1"], metavar="L,M")
    parser.add_argument("--steps", type=int, default=20, help="of a run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", default="pretrain_speed", help="of the result file")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = measure(args.data, args.widths, args.layers, args.reductions, args.steps, args.repeats)
    save(args.name, rows, environment(torch.device("cpu"), "bf16"))
    print(markdown(rows, COLUMNS))


if __name__ == "__main__":
    main()
