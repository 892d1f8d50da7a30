"""`ailurus-hf classify`: the likeliest classes of images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import add_ailurus, add_images, add_model, load, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_images(parser)
    add_model(parser)
    parser.add_argument("--top", type=positive, default=3, help="classes to show (default: %(default)s)")
    add_ailurus(parser)


def run(args: argparse.Namespace) -> int:
    from ..images import read_image
    from .batch import Batch

    batch = Batch(args)
    if not batch.images:
        return batch.finish(None, images=[])
    loaded = load(args, "classify")
    loaded.switch_on()
    names = loaded.class_names()

    def classify(path: Path) -> dict[str, Any]:
        logits = loaded(loaded.prepare(read_image(path))).logits[0].float()
        best = logits.softmax(0).topk(min(args.top, len(names)))
        return {"scores": {names[int(i)]: round(float(score), 4) for score, i in zip(*best, strict=True)}}

    def scores(result: dict[str, Any]) -> str:
        return f"{result['image']}: " + ", ".join(f"{name} {score:.1%}" for name, score in result["scores"].items())

    batch.run(classify, scores)
    return batch.finish(loaded, images=batch.results)
