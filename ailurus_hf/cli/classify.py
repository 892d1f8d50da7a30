"""`ailurus-hf classify`: the likeliest classes of images."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import (
    add_ailurus,
    add_batch_size,
    add_compare,
    add_dataset,
    add_images,
    add_labels_text,
    add_model,
    add_output,
    check_compare,
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
    add_dataset(parser)
    add_model(parser, lines=True)
    add_output(parser, "file of JSON lines for the scores, such as scores.jsonl (default: none)", None)
    parser.add_argument("--top", type=positive, default=3, help="classes to show (default: %(default)s)")
    add_labels_text(parser)
    add_compare(parser, "accuracy", 'a CSV of image names and classes, or "folders": images lie in folders of classes')
    add_batch_size(parser)
    add_ailurus(parser)


def run(args: argparse.Namespace) -> int:
    check_compare(args)
    if args.compare:
        from ..evaluation.predictions import classified
        from .comparing import compare

        return compare(args, "classify", partial(classified, top=args.top), "accuracy")
    from ..evaluation.predictions import likeliest
    from . import predicting
    from .batch import Batch

    batch = Batch(args, to_lines=True)
    if not batch.images:
        return batch.finish(None, images=[])
    loaded = load(args, "classify", batch.device)
    loaded.switch_on()

    def finish(path: Path, image: Image.Image, outputs: Any) -> dict[str, Any]:
        return {"scores": likeliest(loaded, outputs, args.top)}

    def scores(result: dict[str, Any]) -> str:
        return f"{result['image']}: " + ", ".join(f"{name} {score:.1%}" for name, score in result["scores"].items())

    return predicting.run(batch, loaded, finish, scores, args.batch_size)
