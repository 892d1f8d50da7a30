"""`ailurus-hf classify`: the likeliest classes of images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import (
    add_ailurus,
    add_batch_size,
    add_compare,
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

    from ..evaluation.loading import LoadedModel
    from ..evaluation.paired import Pair

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
    add_compare(parser, "accuracy", 'a CSV of image names and classes, or "folders": images lie in folders of classes')
    add_batch_size(parser)
    add_ailurus(parser)


def run(args: argparse.Namespace) -> int:
    check_compare(args)
    if args.compare:
        from .comparing import compare

        return compare(args, "classify", _equal, "accuracy")
    from . import predicting
    from .batch import Batch

    batch = Batch(args, to_lines=True)
    if not batch.images:
        return batch.finish(None, images=[])
    loaded = load(args, "classify", batch.device)
    loaded.switch_on()
    names = loaded.class_names()

    def finish(path: Path, image: Image.Image, outputs: Any) -> dict[str, Any]:
        best = outputs.logits[0].float().softmax(0).topk(min(args.top, len(names)))
        return {"scores": {names[int(i)]: round(float(score), 4) for score, i in zip(*best, strict=True)}}

    def scores(result: dict[str, Any]) -> str:
        return f"{result['image']}: " + ", ".join(f"{name} {score:.1%}" for name, score in result["scores"].items())

    return predicting.run(batch, loaded, finish, scores, args.batch_size)


def _equal(loaded: LoadedModel, image: Image.Image, pair: Pair) -> tuple[float, tuple[()]]:
    """Whether the likeliest class is the same."""
    return float(pair.plain.logits[0].argmax() == pair.reduced.logits[0].argmax()), ()
