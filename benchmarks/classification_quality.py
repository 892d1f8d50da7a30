"""Accuracy and speed of every way to reduce a classifier, on images it was not trained on: table 8.

    python -m benchmarks.classification_quality --model FOLDER --data CIFAR10
    python -m benchmarks.classification_quality --dataset imagenet --data IMAGENET --model facebook/deit-base-patch16-224 \\
        --keep 0.617 0.735 --locations 0 2 4 --methods Expedite 'density peaks, copy (the paper)'

examples/train_classifier.py makes the model for the first. Accuracy is over the whole split; agreement is the share of
images with the plain model's class; speed and images a second are those of the whole model on one batch. A head that
reads the class token alone makes copy and residual the same. Methods: benchmarks/methods.py; without settings of their
own, the peers' FLOPs are matched to ours at the same L and keep ratio.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

from . import quality
from .datasets import CLASSIFICATION, ClassificationData
from .harness import environment, markdown, save

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


def pixel_batches(
    processor: Any, data: ClassificationData, batch_size: int, images: range, device: torch.device
) -> list[Tensor]:
    """The images as the model's processor makes them, Tensor[B, 3, H, W] each."""
    starts = range(images.start, images.stop, batch_size)
    parts = [range(start, min(start + batch_size, images.stop)) for start in starts]
    return [
        processor(images=[data.image(i) for i in part], return_tensors="pt")["pixel_values"].to(device)
        for part in parts
    ]


def measure(
    model: nn.Module,
    processor: Any,
    data: ClassificationData,
    contenders: dict[str, quality.Contender],
    batch_size: int,
    repeats: int,
) -> list[dict[str, Any]]:
    """One row a contender, after one for the plain model."""
    truth = torch.tensor(data.labels)
    batches = pixel_batches(processor, data, batch_size, range(min(8 * batch_size, len(data))), model.device)

    @torch.inference_mode()
    def predictions(which: nn.Module) -> list[Tensor]:
        found = []
        for start in range(0, len(data), batch_size):
            part = range(start, min(start + batch_size, len(data)))
            batch = pixel_batches(processor, data, batch_size, part, model.device)[0]
            found.append(which(batch).logits.argmax(-1).cpu())
        return [torch.cat(found)]

    rows = quality.measure(
        model, [batch[:1] for batch in batches[:2]], batches, lambda which, batch: which(batch), predictions,
        lambda labels: 100 * (labels[0] == truth).float().mean().item(), "accuracy", contenders, repeats,
    )  # fmt: skip
    for row in rows:
        row["images_per_second"] = 1e3 * batch_size / row["ms"]
    return rows


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
    rows = measure(model, processor, data, quality.chosen_contenders(args), args.batch_size, args.repeats)
    about = {"dataset": args.dataset, "split": args.split, "images": len(data), "batch_size": args.batch_size}
    save(args.name, rows, {**environment(args.device, "fp32"), **about})
    print(markdown(rows, COLUMNS))


if __name__ == "__main__":
    main()
