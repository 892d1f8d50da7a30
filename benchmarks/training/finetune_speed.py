"""Time of a training step with the reduction on: the training columns of tables 5 and 6.

    python -m benchmarks.training.finetune_speed      # Segmenter ViT-B/16 at 512 x 512, fp32
    python -m benchmarks.training.finetune_speed --models ViT-L --precision bf16 --batch-size 2
    python -m benchmarks.training.finetune_speed --models CamVid --keep 0.25 --methods 'Ward, smooth'

One step: forward, loss, backward and AdamW's update of the whole model. Random weights: speed does not depend on them;
examples/finetune_segmentation.py trains to a final mIoU. FLOPs are three times those of a forward, as counted by torch:
a product has two in the backward; for ours without what clustering costs. All contenders are one model, on which each
is switched on for its turn.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ailurus_hf import SegmenterConfig, SegmenterForSemanticSegmentation

from ..harness import environment, interleaved, log, markdown, model_flops, save
from ..methods import METHODS, PAPER, Amount, apply_method

# Image size and classes of the paper's tables, and the model's sizes; CamVid: those of the Segmenter that is shipped.
# The decoder has two layers of the encoder's width.
GEOMETRIES = {
    "ViT-L": ((640, 640), 150, {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}),
    "ViT-B": ((512, 512), 150, {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}),
    "Ti": ((512, 512), 150, {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3}),
    "CamVid": ((720, 960), 11, {"hidden_size": 192, "num_hidden_layers": 8, "num_attention_heads": 3}),
}
# The paper's M of 1600 and 1024 tokens; N/4 is 400 and 256.
KEEP = {"ViT-L": [0.25, 0.36, 0.5625], "ViT-B": [0.25, 0.39, 0.5625]}
COLUMNS = {
    "model": "model",
    "method": "method",
    "location": "L",
    "num_clusters": "M",
    "seconds": "training step|{:.2f} s",
    "share_of_plain": "of plain|{:.3f}",
    "ideal_share": "by FLOPs|{:.3f}",
    "tflops": "TFLOPs|{:.2f}",
}


def segmenter(size: tuple[int, int], classes: int, sizes: dict[str, int]) -> SegmenterForSemanticSegmentation:
    encoder = {"model_type": "vit", **sizes, "intermediate_size": 4 * sizes["hidden_size"], "image_size": list(size)}
    config = SegmenterConfig(encoder_config=encoder, num_labels=classes, semantic_loss_ignore_index=255)
    return SegmenterForSemanticSegmentation(config)


def measure(
    name: str,
    methods: list[str],
    keep: list[float],
    repeats: int,
    location: int = 2,
    batch_size: int = 1,
    precision: str = "fp32",
    device: torch.device | str = "cpu",
) -> list[dict[str, Any]]:
    """A row for the plain model, and one a method and keep ratio."""
    device, (size, classes, sizes) = torch.device(device), GEOMETRIES[name]
    torch.manual_seed(0)
    model = segmenter(size, classes, sizes).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    images = torch.randn(3, batch_size, 3, *size, device=device)
    labels = torch.randint(classes, (3, batch_size, *size), device=device)

    def step(turn: int) -> None:
        batch = turn % len(images)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(images[batch], labels=labels[batch]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    settings = {f"{m}, {ratio}": (m, Amount(location, ratio)) for ratio in keep for m in methods}

    def forward() -> Any:
        return model(images[0, :1])

    @contextmanager
    def switched_on(key: str) -> Iterator[None]:
        with ExitStack() as stack:
            if key in settings:
                with torch.no_grad():
                    reduction = apply_method(model, *settings[key], [forward])
                stack.callback(reduction.undo)
            yield

    full = model_flops(forward)
    rows = [{"model": name, "method": "plain", "tflops": 3 * full * batch_size / 1e12, "ideal_share": 1.0}]
    for key, (method, amount) in settings.items():
        with torch.no_grad():
            reduction = apply_method(model, method, amount, [forward])
            flops = reduction.flops(full, forward)
            forward()
        rows.append(
            {
                "model": name,
                "method": method,
                "location": location,
                "keep_ratio": amount.keep,
                "num_clusters": reduction.num_clusters(),
                "tflops": 3 * flops * batch_size / 1e12,
                "ideal_share": flops / full,
            }
        )
        reduction.undo()
        log.info("%s: %.3f of the FLOPs", key, flops / full)
    seconds = interleaved(dict.fromkeys(("plain", *settings), step), repeats, 1, device, switched_on)
    for row, taken in zip(rows, seconds.values(), strict=True):
        row |= {"seconds": taken, "share_of_plain": taken / seconds["plain"], "batch_size": batch_size}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ViT-B"], choices=GEOMETRIES)
    parser.add_argument(
        "--methods", nargs="+", default=[PAPER, "local k-means, copy", "Expedite"], help=", ".join(METHODS)
    )
    parser.add_argument("--keep", nargs="+", type=float, help="default: the paper's of that model")
    parser.add_argument("--location", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 by autocast")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--name", default="finetune_speed", help="of the result file")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = []
    for name in args.models:
        keep = args.keep or KEEP.get(name, [0.25, 0.36, 0.5625])
        rows += measure(
            name, args.methods, keep, args.repeats, args.location, args.batch_size, args.precision, args.device
        )
    save(args.name, rows, environment(torch.device(args.device), args.precision))
    print(markdown(rows, COLUMNS))


if __name__ == "__main__":
    main()
