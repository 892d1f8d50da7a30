"""Backbone speed-up of Mask R-CNN's ViT at the paper's locations and clusters (Tab. 3, 4), on 800-pixel inputs.

    python -m benchmarks.vision.detection_speed                                     # all of ROWS, batch 1, fp32
    python -m benchmarks.vision.detection_speed --models "ViT-L (CAE)" --rows 7,1600
    python -m benchmarks.vision.detection_speed --part pyramid                      # with the transposed convolutions
    python -m benchmarks.vision.detection_speed --device cuda --dtype bf16

A photograph of COCO is 640 x 480 pixels for the most part, so 1067 x 800 as the detector sees it, padded to whole
patches: 1072 x 800, a grid of 50 x 67. CAE's encoder has relative position bias, of heads · N² numbers in each layer; a
plain ViT has none. The encoder is read at four layers in both. Random weights: speed does not depend on them. "Cosine"
is the mean over the four maps that are read, on random images, a lower bound that real images and weights do not reach.
YOLOS is a detector on the same kind of encoder that reads its last layer alone.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BeitConfig, BeitModel, ViTConfig, ViTModel, YolosConfig, YolosForObjectDetection

from ailurus_hf import AiluRusConfig
from ailurus_hf.detection.pyramid import ViTPyramid

from ..harness import DTYPES, SPEED_COLUMNS, environment, log, markdown, reductions_in_turn, save

SIZE = (800, 1072)
PATCHES = {"image_size": 224, "patch_size": 16}
LARGE = {**PATCHES, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
BASE = {**PATCHES, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
# As CAE: position embeddings, relative position bias in every layer.
CAE = {"use_absolute_position_embeddings": True, "use_relative_position_bias": True}


def beit(sizes: dict[str, int]) -> Callable[[], nn.Module]:
    return lambda: ViTPyramid(BeitModel(BeitConfig(**sizes, **CAE), add_pooling_layer=False))


def vit(sizes: dict[str, int]) -> Callable[[], nn.Module]:
    return lambda: ViTPyramid(ViTModel(ViTConfig(**sizes), add_pooling_layer=False))


def yolos(sizes: dict[str, int]) -> Callable[[], nn.Module]:
    return lambda: YolosForObjectDetection(YolosConfig(**{**sizes, "image_size": list(SIZE)}))


MODELS = {
    "ViT-L (CAE)": beit(LARGE),
    "ViT-L": vit(LARGE),
    "ViT-B (CAE)": beit(BASE),
    "ViT-B": vit(BASE),
    "YOLOS-B": yolos(BASE),
}
# Locations and clusters of Tab. 3 (ViT-L) and Tab. 4 (ViT-B); Tab. of the first version are of this
# experiment.
TABLE_3 = [(7, 1600), (9, 1764), (11, 1764), (15, 1600)]
TABLE_4 = [(3, 1296), (3, 1764), (6, 1444), (7, 1444)]
ROWS = {name: TABLE_3 if "ViT-L" in name else TABLE_4 for name in MODELS}
COLUMNS = {
    "model": "model",
    "reduction": "location, tokens",
    **SPEED_COLUMNS,
    "cosine": "cosine|{:.3f}",
}


def run_part(model: nn.Module, part: str) -> Callable[[Tensor], list[Tensor]]:
    """Images to what is read of the model: the encoder's layers, the maps made of them, or YOLOS's predictions."""
    if not isinstance(model, ViTPyramid):
        return lambda images: [model(images).pred_boxes]
    # Maps are what a caller of the model sees, so the encoder alone is the pyramid without what it makes of the layers.
    if part == "encoder":
        model.scales = nn.ModuleList(nn.Identity() for _ in model.scales)
    return lambda images: list(model(images).values())


@torch.no_grad()  # BEiT keeps tensors that it makes, and could not train on with those of inference mode
def measure(
    name: str,
    rows: list[tuple[int, int]],
    repeats: int,
    size: tuple[int, int] = SIZE,
    part: str = "encoder",
    *,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
) -> list[dict[str, Any]]:
    """A row for each location and number of clusters; one model, switched on for each contender's turn alone."""
    torch.manual_seed(0)
    # The counter of FLOPs follows YOLOS's positions otherwise.
    model = MODELS[name]().eval().requires_grad_(False).to(device, DTYPES[precision])
    forward = run_part(model, part)
    images = torch.randn(3, 1, 3, *size).to(device, DTYPES[precision])
    configs = [AiluRusConfig.paper(location, clusters) for location, clusters in rows]
    return [
        {
            "model": name,
            "part": part,
            "reduction": f"{location}, {row['tokens']}",
            "location": location,
            "num_clusters": clusters,
            **row,
        }
        for (location, clusters), row in zip(
            rows, reductions_in_turn(model, forward, images, configs, repeats), strict=True
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--rows", nargs="+", metavar="L,M", help="instead of the paper's")
    parser.add_argument("--part", default="encoder", choices=["encoder", "pyramid"])
    parser.add_argument("--size", nargs=2, type=int, default=SIZE, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--name", default="detection_speed", help="of the result file")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    given = [tuple(map(int, row.split(","))) for row in args.rows or []]
    options = {"device": args.device, "precision": args.dtype}
    rows = []
    for name in args.models:
        rows += measure(name, given or ROWS[name], args.repeats, tuple(args.size), args.part, **options)
        log.info("%s", markdown(rows, COLUMNS).splitlines()[-1])
    save(args.name, rows, environment(args.device, args.dtype))
    print(markdown(rows, COLUMNS))


if __name__ == "__main__":
    main()
