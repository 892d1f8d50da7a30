"""Which tokens each way of clustering joins on one picture, and what is left of the picture: figure 2.

    python -m benchmarks.clustering.cluster_pictures                                # the shipped Segmenter and street
    python -m benchmarks.clustering.cluster_pictures --image photo.jpg --keep 0.25 --clusterings density_peaks ward

A column for each clustering; docs/clusters.jpg is the first of these.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from PIL import Image

from ailurus_hf import SegmenterForSemanticSegmentation, SegmenterImageProcessor, ailurus_enabled, ailurus_status
from ailurus_hf.config import clustering_names
from ailurus_hf.visualization import draw_assignment, reconstruct_image

from ..harness import ROOT, log

matplotlib.use("Agg")


@torch.inference_mode()
def draw(model: SegmenterForSemanticSegmentation, pixels: torch.Tensor, image: Image.Image, settings: dict) -> Figure:
    """A column for each clustering: the assignment above, the picture rebuilt from clusters' mean patches below.

    pixels: Tensor[1, 3, H, W], what the model sees of the image. settings: of AiluRusConfig, by title.
    """
    figure = Figure(figsize=(5 * len(settings), 5 * 2 * image.height / image.width + 0.4), layout="constrained")
    axes = figure.subplots(2, len(settings), squeeze=False)
    for column, (title, fields) in enumerate(settings.items()):
        with ailurus_enabled(model, **fields):
            model(pixels)
            status = ailurus_status(model)
        clusters, grid = status.last_clusters, status.last_grid
        axes[0, column].set_title(f"{title}, {clusters.num_tokens} to {clusters.num_clusters}")
        axes[0, column].imshow(draw_assignment(image, clusters, grid))
        axes[1, column].imshow(reconstruct_image(image, clusters, grid))
    for each in axes.flat:
        each.set_axis_off()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "examples/assets/segmenter-camvid"), help="Segmenter folder")
    parser.add_argument("--image", type=Path, default=ROOT / "examples/assets/street.jpg")
    parser.add_argument("--location", type=int, default=2)
    parser.add_argument("--keep", type=float, default=0.12)
    parser.add_argument(
        "--clusterings", nargs="+", default=["density_peaks", "local_kmeans", "ward"], choices=clustering_names()
    )
    parser.add_argument("--output", type=Path, default=ROOT / "docs/clusters.jpg")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = SegmenterForSemanticSegmentation.from_pretrained(args.model, dtype=torch.float32).eval()
    processor = SegmenterImageProcessor.from_pretrained(args.model)
    image = Image.open(args.image).convert("RGB")
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    shared = {"cluster_location": args.location, "keep_ratio": args.keep, "restore": "copy"}
    figure = draw(model, pixels, image, {name: {**shared, "clustering": name} for name in args.clusterings})
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=100)
    log.info("wrote %s", args.output)


if __name__ == "__main__":
    main()
