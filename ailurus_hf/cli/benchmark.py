"""`ailurus-hf benchmark`: speed and fidelity of several settings on one's own model and images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import add_images, add_labels_text, add_model, positive

EXAMPLES = """
  ailurus-hf benchmark photos --model my-segmenter --methods local-kmeans ward-smooth --keep 0.5 0.25
  ailurus-hf benchmark photos --model my-classifier --methods pairs-copy --labels classes.csv
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_images(parser)
    add_model(parser)
    parser.add_argument("--methods", nargs="+", default=["density-peaks", "local-kmeans"], help="default: %(default)s")
    parser.add_argument("--keep", nargs="+", type=float, default=[0.5, 0.25], help="ratios (default: %(default)s)")
    parser.add_argument("--locations", nargs="+", type=int, default=[2], help="layers (default: %(default)s)")
    parser.add_argument("--labels", help="ground truth, as in segment, classify and detect: adds a column of scores")
    add_labels_text(parser)
    parser.add_argument("--repeats", type=positive, default=7, help="timed rounds (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    from ..evaluation import benchmark
    from ..evaluation.loading import load_model
    from ..evaluation.scoring import scorer_for
    from ..evaluation.timing import measured_on
    from ..evaluation.verdict import verdict
    from ..images import read_image
    from .batch import Batch
    from .telling import progress

    configs = benchmark.settings(args.methods, args.locations, args.keep)
    batch = Batch(args)
    if not batch.images:
        return batch.finish(None, num_images=0, rows=[])
    loaded = load_model(args.model, None, args.device, args.dtype, None, labels_text=args.labels_text)
    scorer = scorer_for(loaded, args.labels) if args.labels else None

    def check(path: Path) -> dict[str, Any]:
        loaded.prepare(read_image(path))
        return {}

    batch.run(check, lambda result: None)  # before anything is measured
    images = [Path(result["image"]) for result in batch.results]
    if not images:
        return batch.finish(loaded, num_images=0, rows=[])
    rows = benchmark.benchmark(loaded, images, configs, args.repeats, progress, scorer)
    best = max(row.speed_up for row in rows[1:])
    told = verdict(int((rows[1].tokens or "0").split()[0]), best)
    if not args.json:
        print(benchmark.as_markdown(rows))
    batch.advise(told)
    return batch.finish(
        loaded,
        num_images=len(images),
        measured_on=measured_on(loaded.device, str(loaded.dtype).removeprefix("torch.")),
        rows=[row.to_dict() for row in rows],
        verdict=told,
    )
