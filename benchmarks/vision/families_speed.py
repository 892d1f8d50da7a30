"""Speed-up, and share of what the FLOPs allow, for full-size models with dense heads and models in stages.

    python -m benchmarks.vision.families_speed                                   # all of GEOMETRIES, batch 1, fp32
    python -m benchmarks.vision.families_speed --models "SegFormer-B5 1024" --stages 1 2 3 4
    python -m benchmarks.vision.families_speed --device cuda --dtype bf16

Random weights: speed does not depend on them. Fidelity is the cosine to the plain model's prediction on random images,
a lower bound that real images and weights do not reach.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    EomtConfig,
    EomtForUniversalSegmentation,
    SamVisionConfig,
    SamVisionModel,
    SegformerConfig,
    SegformerModel,
    VitDetConfig,
    VitDetModel,
)

from ailurus_hf import AiluRusConfig

from ..harness import DTYPES, SPEED_COLUMNS, environment, log, markdown, reductions_in_turn, save

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}


def depth_anything(
    size: int, sizes: dict[str, int] = LARGE, neck: Sequence[int] = (256, 512, 1024, 1024), fusion: int = 256
) -> nn.Module:
    """DINOv2-L with the DPT head, which reads four layers. sizes, neck, fusion: of other ones."""
    depth = sizes["num_hidden_layers"]
    backbone = Dinov2Config(
        **sizes,
        image_size=size,
        patch_size=14,
        out_features=[f"stage{depth * part // 24}" for part in (5, 12, 18, 24)],
        reshape_hidden_states=False,
    )
    return DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=backbone,
            reassemble_hidden_size=sizes["hidden_size"],
            neck_hidden_sizes=list(neck),
            fusion_hidden_size=fusion,
        )
    )


def eomt(size: int, masks_attention: bool = False, sizes: dict[str, int] = LARGE) -> nn.Module:
    """EoMT-L: 200 queries join in the last four layers.

    Its training fades out the masks that queries put on attention (mask annealing), and a trained checkpoint has none
    left: it predicts masks once, at the end. `masks_attention` is a checkpoint from before that, which predicts them in
    front of each of the last layers too.
    """
    model = EomtForUniversalSegmentation(
        EomtConfig(**sizes, image_size=size, patch_size=16, num_queries=200, num_blocks=4)
    )
    model.attn_mask_probs.fill_(float(masks_attention))
    return model


def sam(size: int) -> nn.Module:
    """SAM-B's image encoder: 4 of 12 layers have global attention."""
    return SamVisionModel(SamVisionConfig(image_size=size, initializer_range=0.02))


def vitdet(size: int) -> nn.Module:
    """VitDet-B, as ViTMatte and detectron2 have it but for convolutions."""
    windowed = [0, 1, 3, 4, 6, 7, 9, 10]
    return VitDetModel(
        VitDetConfig(
            image_size=size, window_size=14, window_block_indices=windowed, use_relative_position_embeddings=True
        )
    )


def segformer(depths: list[int], hidden_sizes: list[int]) -> Callable[[int], nn.Module]:
    return lambda size: SegformerModel(SegformerConfig(depths=depths, hidden_sizes=hidden_sizes, image_size=size))


@dataclass(frozen=True)
class Geometry:
    """make: the model for square images of `size` pixels. fields: of AiluRusConfig. prediction: from its output."""

    make: Callable[[int], nn.Module]
    size: int
    prediction: Callable[[Any], torch.Tensor]
    fields: dict[str, Any] = field(default_factory=lambda: {"cluster_location": 4, "keep_ratio": 0.25})


STAGE = {"cluster_location": 0, "keep_ratio": 0.25}
B0, B2, B5 = (
    segformer([2, 2, 2, 2], [32, 64, 160, 256]),
    segformer([3, 4, 6, 3], [64, 128, 320, 512]),
    segformer([3, 6, 40, 3], [64, 128, 320, 512]),
)
GEOMETRIES = {
    "DINOv2-L + DPT head 518": Geometry(depth_anything, 518, lambda out: out.predicted_depth),
    "EoMT-L 640": Geometry(eomt, 640, lambda out: out.masks_queries_logits),
    "EoMT-L 640, attention masked": Geometry(
        lambda size: eomt(size, masks_attention=True), 640, lambda out: out.masks_queries_logits
    ),
    "SAM-B 1024": Geometry(sam, 1024, lambda out: out.last_hidden_state, STAGE),
    "VitDet-B 1024": Geometry(vitdet, 1024, lambda out: out.last_hidden_state, STAGE),
    **{
        f"SegFormer-{name} {size}": Geometry(make, size, lambda out: out.last_hidden_state, STAGE)
        for name, make in (("B0", B0), ("B2", B2), ("B5", B5))
        for size in (512, 1024)
    },
}
COLUMNS = {
    "model": "model",
    "reduction": "reduced",
    **SPEED_COLUMNS,
    "cosine": "cosine|{:.3f}",
}


@torch.inference_mode()
def measure(
    name: str,
    clusterings: Sequence[str],
    repeats: int,
    stages: list[tuple[int, ...]] | None = None,
    *,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    batch: int = 1,
) -> list[dict[str, Any]]:
    """A row a clustering and choice of stages; one model, on which each contender is switched on for its turn alone."""
    geometry = GEOMETRIES[name]
    torch.manual_seed(0)
    model = geometry.make(geometry.size).eval().to(device, DTYPES[precision])
    images = torch.randn(3, batch, 3, geometry.size, geometry.size).to(device, DTYPES[precision])
    fields = [
        {**geometry.fields, "clustering": clustering, **({"stages": chosen} if chosen else {})}
        for clustering in clusterings
        for chosen in stages or [None]
    ]
    rows = reductions_in_turn(
        model, lambda image: [geometry.prediction(model(image))], images, [AiluRusConfig(**f) for f in fields], repeats
    )
    return [
        {"model": name, "batch": batch, "reduction": f"{row['tokens']}, {given['clustering']}", **row, **given}
        for row, given in zip(rows, fields, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(GEOMETRIES), choices=GEOMETRIES)
    parser.add_argument("--clusterings", nargs="+", default=["density_peaks", "local_kmeans"])
    parser.add_argument("--stages", nargs="+", type=int, help="each of these alone, and then all (SegFormer)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--name", default="families_speed", help="of the result file")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    chosen = [*((stage,) for stage in args.stages), tuple(args.stages)] if args.stages else None
    options = {"device": args.device, "precision": args.dtype, "batch": args.batch}
    rows = []
    for name in args.models:
        rows += measure(name, args.clusterings, args.repeats, chosen, **options)
        log.info("%s", markdown(rows, COLUMNS).splitlines()[-1])
    save(args.name, rows, environment(args.device, args.dtype))
    print(markdown(rows, COLUMNS))


if __name__ == "__main__":
    main()
