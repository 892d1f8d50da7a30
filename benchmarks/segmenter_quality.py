"""Quality and speed of every way to reduce a trained Segmenter, on real images it was not trained on.

    python -m benchmarks.segmenter_quality --data CAMVID                      # the shipped model, CamVid val
    python -m benchmarks.segmenter_quality --data CAMVID --model FOLDER --keep 0.5 0.25 --locations 2 3
    python -m benchmarks.segmenter_quality --dataset ade20k --data ADE --model CONVERTED --methods ToMe:r=40 Expedite

mIoU over whole images at native resolution, whatever size the model's image processor makes of them; agreement is the
share of pixels with the plain model's label; speed is that of the whole model on one image. Methods, controls and peers:
benchmarks/methods.py; "NAME:key=value" sets a peer's own settings, and without them its FLOPs are matched to ours at the
same L and keep ratio.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ailurus_hf import SegmenterForSemanticSegmentation, SegmenterImageProcessor
from ailurus_hf.comparison import confusion, mean_iou
from ailurus_hf.segmenter import first_window, windowed_outputs

from . import quality
from .datasets import DATASETS, SegmentationData
from .harness import environment, markdown, save

SHIPPED = Path(__file__).parent.parent / "examples" / "assets" / "segmenter-camvid"
COLUMNS = {
    "method": "method",
    "location": "L",
    "num_clusters": "M",
    "gflops": "GFLOPs|{:.2f}",
    "ms": "an image|{:.0f} ms",
    "miou": "mIoU|{:.2f}",
    "lost": "lost|{:+.2f}",
    "agreement": "agreement|{:.1%}",
    "speed_up": "speed-up|{:.2f}×",
    "share_of_ideal": "share of ideal|{:.2f}",
}


def pixel_values(
    processor: SegmenterImageProcessor, data: SegmentationData, index: int, device: torch.device
) -> Tensor:
    return processor(images=data.image(index), return_tensors="pt")["pixel_values"].to(device)


@torch.inference_mode()
def label_maps(model: nn.Module, processor: SegmenterImageProcessor, data: SegmentationData) -> list[Tensor]:
    maps = []
    for i in range(len(data)):
        outputs = windowed_outputs(model, processor, pixel_values(processor, data, i, model.device))
        maps += processor.post_process_semantic_segmentation(outputs, target_sizes=[data.image(i).size[::-1]])
    return [labels.to(torch.uint8).cpu() for labels in maps]


def miou(maps: list[Tensor], data: SegmentationData) -> float:
    """Percent, over the labelled pixels of all images."""
    matrices = (confusion(m.numpy().astype(int), data.label(i).numpy(), data.num_classes) for i, m in enumerate(maps))
    return round(100 * mean_iou(np.sum(list(matrices), axis=0)), 2)


def measure(
    model: nn.Module,
    processor: SegmenterImageProcessor,
    data: SegmentationData,
    contenders: dict[str, quality.Contender],
    repeats: int,
) -> list[dict[str, Any]]:
    """One row a contender, after one for the plain model."""
    chosen = range(0, len(data), max(len(data) // 2, 1))
    samples = [first_window(processor, pixel_values(processor, data, i, model.device)) for i in chosen]
    images = [pixel_values(processor, data, i, model.device) for i in range(0, len(data), 7)]
    return quality.measure(
        model, samples, images, lambda which, image: windowed_outputs(which, processor, image),
        lambda which: label_maps(which, processor, data), lambda maps: miou(maps, data), "miou", contenders, repeats,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="camvid", choices=DATASETS)
    parser.add_argument("--model", default=str(SHIPPED), help="Segmenter folder or Hub name (default: the shipped one)")
    quality.add_arguments(parser, [0.5, 0.25, 0.12], [2, 4], "segmenter_quality")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = SegmenterForSemanticSegmentation.from_pretrained(args.model, dtype=torch.float32)
    model.eval().to(args.device)
    processor = SegmenterImageProcessor.from_pretrained(args.model)
    data = SegmentationData(args.dataset, args.data, limit=args.limit)
    rows = measure(model, processor, data, quality.chosen_contenders(args), args.repeats)
    save(args.name, rows, {**environment(args.device, "fp32"), "dataset": args.dataset, "images": len(data)})
    print(markdown(rows, {**COLUMNS, **({"restore_location": "R"} if args.restore_locations else {})}))


if __name__ == "__main__":
    main()
