"""`ailurus-hf classify`: the likeliest classes of images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import (
    add_ailurus,
    add_batch_size,
    add_images,
    add_labels_text,
    add_model,
    add_output,
    load,
    positive,
)

if TYPE_CHECKING:
    from PIL import Image

EXAMPLES = """
  ailurus-hf classify photos --model google/vit-base-patch16-384 --preset classification
  ailurus-hf classify photos --model openai/clip-vit-base-patch16 --labels-text "a cat" "a dog" --output scores.jsonl
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_images(parser)
    add_model(parser, lines=True)
    add_output(parser, "file of JSON lines for the scores, such as scores.jsonl (default: none)", None)
    parser.add_argument("--top", type=positive, default=3, help="classes to show (default: %(default)s)")
    add_labels_text(parser)
    add_batch_size(parser)
    add_ailurus(parser)


def run(args: argparse.Namespace) -> int:
    from .batch import Batch
    from .predicting import predict, tell_taken

    batch = Batch(args, to_lines=True)
    if not batch.images:
        return batch.finish(None, images=[])
    loaded = load(args, "classify")
    loaded.switch_on()
    names = loaded.class_names()

    def finish(path: Path, image: Image.Image, outputs: Any) -> dict[str, Any]:
        best = outputs.logits[0].float().softmax(0).topk(min(args.top, len(names)))
        return {"scores": {names[int(i)]: round(float(score), 4) for score, i in zip(*best, strict=True)}}

    def scores(result: dict[str, Any]) -> str:
        return f"{result['image']}: " + ", ".join(f"{name} {score:.1%}" for name, score in result["scores"].items())

    taken = predict(batch, loaded, finish, scores, args.batch_size)
    tell_taken(taken, batch)
    return batch.finish(loaded, images=batch.results, took=taken.to_dict())
