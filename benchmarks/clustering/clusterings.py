"""Why one clustering keeps more than another: properties of its clusters, and what the model makes of them.

    python -m benchmarks.clustering.clusterings --data CAMVID               # the shipped Segmenter, CamVid val
    python -m benchmarks.clustering.clusterings --data CAMVID --size 800    # as many tokens as a detector has
    python -m benchmarks.clustering.clusterings --dataset cifar10 --data CIFAR10 --model CLASSIFIER --locations 1

For each method: time of one clustering; of the tokens at L, the share of their variance that is left inside clusters
("unexplained"), clusters of one token, the largest distance on the grid between a token and the nearest center ("gap"),
and the mean cosine between a token and its cluster's mean; the mean cosine of the last layer's tokens to the plain
model's; and mIoU or accuracy. Methods: any of benchmarks/methods, its variants.py included.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ailurus_hf.evaluation.loading import LoadedModel, load_model

from ..harness import environment, markdown, save
from ..harness.datasets import CLASSIFICATION, DATASETS, ClassificationData, SegmentationData, evenly
from ..methods import EVERY, PAPER, Amount
from ..methods.variants import CLUSTERINGS, OF_MODEL
from ..vision import quality, similarity
from ..vision.classification_quality import classification
from ..vision.segmenter_quality import SHIPPED, at_size, segmentation

WAYS = ("density peaks", "local k-means", "k-means", "Ward", "random centers", "grid pooling", *CLUSTERINGS, *OF_MODEL)
COLUMNS = {
    "method": "method",
    "location": "L",
    "num_clusters": "M",
    "ideal": "FLOPs-ideal|{:.2f}×",
    "cluster_ms": "cluster|{:.1f} ms",
    "unexplained": "unexplained|{:.3f}",
    "singletons": "singletons|{:.1%}",
    "gap": "gap|{:.1f}",
    "similarity": "cosine at L|{:.4f}",
    "last": "cosine at the end|{:.4f}",
    "miou": "mIoU|{:.2f}",
    "accuracy": "accuracy|{:.2f}",
    "lost": "lost|{:+.2f}",
}


def chosen_methods(restore: str, location: int, keep: float, depth: int, batch_size: int) -> list[str]:
    """Names for the registry: every clustering; two reductions; last layers on all tokens; M by content."""
    names = [PAPER if (way, restore) == ("density peaks", "copy") else f"{way}, {restore}" for way in WAYS]
    between = (location + depth) // 2
    by_content = [f"local k-means, {restore}:min_keep_ratio={keep / 2},keep_ratio={min(1.5 * keep, 0.99)}"]
    return [
        *(name for name in names if name in EVERY),
        f"{names[0]}:cluster_location=({location},{between}),keep_ratio=({min(1.2 * keep, 1)},{0.6 * keep})",
        f"local k-means, {restore}:restore_location={depth - 1}",
        *(by_content if batch_size == 1 else []),
    ]


def measure(
    loaded: LoadedModel,
    task: quality.Scored,
    inputs: list[dict[str, Tensor]],
    methods: list[str],
    amount: Amount,
    repeats: int,
) -> list[dict[str, Any]]:
    """A row a method, after one for the plain model. inputs: images of which clusters and features are looked at."""
    plain = [similarity.hidden_states(loaded, each) for each in inputs]
    seen = {
        m: similarity.measure_one(loaded, m, amount, inputs, plain, repeats) for m in tqdm(methods, desc="clusters")
    }
    contenders = {m: (m, amount.location, amount.keep, None) for m in methods}
    first, *rows = quality.scored(loaded.model, task, contenders)[0]
    for row in rows:
        found = seen[row["method"]]
        row |= {**found["assignment"], "last": found["last"], "cluster_ms": found["ms"]["cluster"]}
    return [first, *rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="camvid", choices=[*DATASETS, *CLASSIFICATION])
    parser.add_argument("--data", help="the data set's folder (default: the one of its name in AILURUS_DATA)")
    parser.add_argument(
        "--model", default=str(SHIPPED), help="model folder or Hub name (default: the shipped Segmenter)"
    )
    parser.add_argument("--size", type=int, help="shortest edge of the images (default: the model's)")
    parser.add_argument("--methods", nargs="+", help="of benchmarks/methods/registry.py (default: all ways to choose)")
    parser.add_argument("--restore", default="copy", choices=("copy", "smooth", "residual"))
    parser.add_argument("--locations", nargs="+", type=int, default=[2])
    parser.add_argument("--keep", nargs="+", type=float, default=[0.25])
    parser.add_argument("--limit", type=int, help="only so many images, evenly from the whole split")
    parser.add_argument("--looked-at", type=int, default=8, help="images of which clusters and features are looked at")
    parser.add_argument("--repeats", type=int, default=3, help="timed clusterings")
    parser.add_argument("--name", default="clusterings", help="of the result file")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    loaded = load_model(args.model, None, "cpu", "float32", None)
    at_size(loaded.processor, args.size)
    if args.dataset in DATASETS:
        data: Any = SegmentationData(args.dataset, args.data, limit=args.limit)
        task = segmentation(loaded.model, loaded.processor, data)
    else:
        data = ClassificationData(args.dataset, args.data, limit=args.limit)
        task = classification(loaded.model, loaded.processor, data, 16)
    inputs = [loaded.prepare(data.image(index)) for index in evenly(range(len(data)), args.looked_at)]
    depth = len(similarity.find_encoders(loaded.model)[0].layers)
    rows: list[dict[str, Any]] = []
    for location in args.locations:
        for keep in args.keep:
            names = args.methods or chosen_methods(args.restore, location, keep, depth, task.batch_size)
            found = measure(loaded, task, inputs, names, Amount(location, keep), args.repeats)
            rows += found[1:] if rows else found
    about = {"dataset": args.dataset, "images": len(data), "looked_at": len(inputs), "size": args.size}
    save(args.name, rows, {**environment(torch.device("cpu"), "fp32"), **about})
    print(markdown(rows, {key: head for key, head in COLUMNS.items() if any(key in row for row in rows)}))


if __name__ == "__main__":
    main()
