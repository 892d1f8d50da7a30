"""Quality and speed of every way to reduce a trained Segmenter, on real images it was not trained on.

    python -m benchmarks.vision.segmenter_quality --data CAMVID                      # the shipped model, CamVid val
    python -m benchmarks.vision.segmenter_quality --data CAMVID --model FOLDER --keep 0.5 0.25 --locations 2 3
    python -m benchmarks.vision.segmenter_quality --dataset ade20k --data ADE --model CONVERTED --methods ToMe:r=40

mIoU over whole images at native resolution, whatever size the model's image processor makes of them; agreement is the
share of pixels with the plain model's label; speed is that of the whole model on one image. Intervals are over images,
by bootstrap (`--resamples`, `--seed`); a difference is called one where its interval leaves out 0; `--against METHOD`
compares the others with it at the same L and keep ratio. Methods, controls and peers: benchmarks/methods/registry.py;
"NAME:key=value" sets a peer's own settings; without them its FLOPs are matched to ours at the same L and keep ratio.
"""

from __future__ import annotations

import argparse
import functools
import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.image_utils import SizeDict

from ailurus_hf import SegmenterForSemanticSegmentation, SegmenterImageProcessor
from ailurus_hf.evaluation.comparison import confusion, mean_iou
from ailurus_hf.segmenter import first_window, windowed_outputs

from ..harness import ROOT, environment, measured_columns, save
from ..harness.datasets import DATASETS, SegmentationData
from . import quality

SHIPPED = ROOT / "examples" / "assets" / "segmenter-camvid"
# Images of which forwards are timed, evenly from the split; more are not held in memory.
TIMED = 15
COLUMNS = {
    "method": "method",
    "location": "L",
    "num_clusters": "M",
    "gflops": "GFLOPs|{:.2f}",
    "ms": "an image|{:.0f} ms",
    "miou": "mIoU|{:.2f}",
    "score_between": "mIoU, 95 %|{0[0]:.2f} to {0[1]:.2f}",
    "lost": "lost|{:+.2f}",
    "lost_between": "lost, 95 %|{0[0]:+.2f} to {0[1]:+.2f}",
    "lost_is": "loss or chance",
    "reference": "beside",
    "behind": "behind it|{:+.2f}",
    "behind_between": "behind, 95 %|{0[0]:+.2f} to {0[1]:+.2f}",
    "behind_is": "behind or chance",
    "agreement": "agreement|{:.1%}",
    "speed_up": "speed-up|{:.2f}×",
    "share_of_ideal": "share of ideal|{:.2f}",
}


def pixel_values(
    processor: SegmenterImageProcessor, data: SegmentationData, index: int, device: torch.device
) -> Tensor:
    return processor(images=data.image(index), return_tensors="pt")["pixel_values"].to(device)


def at_size(processor: Any, size: int | None) -> None:
    """Has the processor make images of that shortest edge, where one is given."""
    if size is not None:
        processor.do_resize, processor.size = True, SizeDict(shortest_edge=size)


def segmentation(model: nn.Module, processor: SegmenterImageProcessor, data: SegmentationData) -> quality.Scored:
    """mIoU in percent, over the labeled pixels of all images."""
    prepared = functools.partial(pixel_values, processor, data, device=model.device)

    def labels(which: nn.Module, pixels: Tensor, truth: Tensor) -> Tensor:
        outputs, size = windowed_outputs(which, processor, pixels), tuple(truth.shape)
        return processor.post_process_semantic_segmentation(outputs, target_sizes=[size])[0][None].cpu()

    return quality.Scored(
        score_name="miou",
        samples=[first_window(processor, prepared(index)) for index in range(0, len(data), max(len(data) // 2, 1))],
        timed=[prepared(index) for index in range(0, len(data), -(-len(data) // TIMED))],
        forward=lambda which, pixels: windowed_outputs(which, processor, pixels),
        batches=lambda: ((prepared(index), data.label(index)) for index in range(len(data))),
        labels=labels,
        counts=lambda found, truth: confusion(found[0].numpy(), truth.numpy(), data.num_classes),
        score=lambda matrix: 100 * mean_iou(matrix),
        num_batches=len(data),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="camvid", choices=DATASETS)
    parser.add_argument("--model", default=str(SHIPPED), help="Segmenter folder or Hub name (default: the shipped one)")
    parser.add_argument("--size", type=int, help="shortest edge of the images (default: the model's)")
    quality.add_arguments(parser, [0.5, 0.25, 0.12], [2, 4], "segmenter_quality")
    parser.add_argument("--resamples", type=int, default=2000, help="of the images, for intervals (0: no intervals)")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples")
    parser.add_argument("--against", help="one of the methods, with which the others are compared")
    args = parser.parse_args()
    if args.against not in (None, *args.methods):
        parser.error(f"--against must be one of --methods, got {args.against!r}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = SegmenterForSemanticSegmentation.from_pretrained(args.model, dtype=torch.float32)
    model.eval().to(args.device)
    processor = SegmenterImageProcessor.from_pretrained(args.model)
    at_size(processor, args.size)
    data = SegmentationData(args.dataset, args.data, limit=args.limit)
    resampling = None
    if args.resamples:
        resampling = quality.Resampling(np.random.default_rng(args.seed), args.resamples, args.against)
    contenders = quality.chosen_contenders(args)
    rows = quality.measure(model, segmentation(model, processor, data), contenders, args.repeats, resampling)
    about = {"dataset": args.dataset, "images": len(data), "size": args.size}
    save(args.name, rows, {**environment(args.device, "fp32"), **about, "resamples": args.resamples, "seed": args.seed})
    print(measured_columns(rows, {**COLUMNS, **({"restore_location": "R"} if args.restore_locations else {})}))


if __name__ == "__main__":
    main()
