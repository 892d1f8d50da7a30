"""Accuracy and speed of every way to reduce a classifier, on images it was not trained on: table 8.

    python -m benchmarks.vision.classification_quality --model FOLDER --data CIFAR10
    python -m benchmarks.vision.classification_quality --dataset imagenet --data IMAGENET --model DEIT \\
        --keep 0.617 0.735 --locations 0 2 4 --methods Expedite 'density peaks, copy (the paper)'

examples/train_classifier.py makes the model for the first. Accuracy is over the whole split; agreement is the share of
images with the plain model's class; speed and images a second are those of the whole model on one batch. A head that
reads the class token alone makes copy and residual the same. Methods: benchmarks/methods/registry.py; without settings
of their own, the peers' FLOPs are matched to ours at the same L and keep ratio.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

from ..harness import environment, markdown, save
from ..harness.datasets import CLASSIFICATION, ClassificationData
from . import quality

# Batches of which forwards are timed.
TIMED = 8
COLUMNS = {
    "method": "method",
    "location": "L",
    "num_clusters": "M",
    "images_per_second": "images/s|{:.1f}",
    "gflops": "GFLOPs|{:.3f}",
    "accuracy": "accuracy|{:.2f}",
    "lost": "lost|{:+.2f}",
    "agreement": "agreement|{:.1%}",
    "speed_up": "speed-up|{:.2f}×",
    "share_of_ideal": "share of ideal|{:.2f}",
}


def classification(model: nn.Module, processor: Any, data: ClassificationData, batch_size: int) -> quality.Scored:
    """Accuracy in percent."""
    truth = torch.tensor(data.labels)
    parts = [range(start, min(start + batch_size, len(data))) for start in range(0, len(data), batch_size)]

    def prepared(part: range) -> Tensor:
        """The images as the model's processor makes them, Tensor[B, 3, H, W]."""
        pixels = processor(images=[data.image(i) for i in part], return_tensors="pt")["pixel_values"]
        return pixels.to(model.device)

    timed = [prepared(part) for part in parts[:TIMED]]
    return quality.Scored(
        score_name="accuracy",
        samples=[batch[:1] for batch in timed[:2]],
        timed=timed,
        forward=lambda which, pixels: which(pixels),
        batches=lambda: ((prepared(part), truth[part.start : part.stop]) for part in parts),
        labels=lambda which, pixels, truth: which(pixels).logits.argmax(-1).cpu(),
        counts=lambda found, truth: np.array([(found == truth).sum(), len(truth)]),
        score=lambda counts: 100 * counts[0] / counts[1],
        num_batches=len(parts),
        batch_size=batch_size,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name of a classifier")
    parser.add_argument("--dataset", default="cifar10", choices=CLASSIFICATION)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--batch-size", type=int, default=16)
    quality.add_arguments(parser, [0.5, 0.35, 0.25], [1, 2, 3, 4], "classification_quality")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = AutoModelForImageClassification.from_pretrained(args.model, dtype=torch.float32)
    model.eval().to(args.device)
    processor = AutoImageProcessor.from_pretrained(args.model)
    data = ClassificationData(args.dataset, args.data, args.split, args.limit)
    task = classification(model, processor, data, args.batch_size)
    rows = quality.measure(model, task, quality.chosen_contenders(args), args.repeats)
    about = {"dataset": args.dataset, "split": args.split, "images": len(data), "batch_size": args.batch_size}
    save(args.name, rows, {**environment(args.device, "fp32"), **about})
    print(markdown(rows, COLUMNS))


if __name__ == "__main__":
    main()
