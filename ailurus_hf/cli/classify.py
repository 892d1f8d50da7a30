"""`ailurus-hf classify`: the likeliest classes of images."""

from __future__ import annotations

import argparse
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

    from ..evaluation.loading import LoadedModel
    from ..evaluation.paired import Pair
    from ..evaluation.report import Shown

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
        from .comparing import compare

        return compare(args, "classify", lambda *found: _predictions(args.top, *found), "accuracy")
    from . import predicting
    from .batch import Batch

    batch = Batch(args, to_lines=True)
    if not batch.images:
        return batch.finish(None, images=[])
    loaded = load(args, "classify", batch.device)
    loaded.switch_on()

    def finish(path: Path, image: Image.Image, outputs: Any) -> dict[str, Any]:
        return {"scores": _likeliest(loaded, outputs, args.top)}

    def scores(result: dict[str, Any]) -> str:
        return f"{result['image']}: " + ", ".join(f"{name} {score:.1%}" for name, score in result["scores"].items())

    return predicting.run(batch, loaded, finish, scores, args.batch_size)


def _predictions(top: int, loaded: LoadedModel, image: Image.Image, pair: Pair) -> tuple[float, Shown]:
    """Whether the likeliest class is the same, and the likeliest ones of both."""
    from ..evaluation.report import Shown

    same = pair.plain.logits[0].argmax() == pair.reduced.logits[0].argmax()
    told = [_likeliest(loaded, outputs, top) for outputs in (pair.plain, pair.reduced)]
    plain, reduced = (", ".join(f"{name} {score:.1%}" for name, score in scores.items()) for scores in told)
    return float(same), Shown(rows=[("likeliest", plain, reduced)])


def _likeliest(loaded: LoadedModel, outputs: Any, top: int) -> dict[str, float]:
    """The likeliest classes with their scores, the best first."""
    names = loaded.class_names()
    best = outputs.logits[0].float().softmax(0).topk(min(top, len(names)))
    return {names[int(i)]: round(float(score), 4) for score, i in zip(*best, strict=True)}
