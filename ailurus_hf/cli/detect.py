"""`ailurus-hf detect`: objects in images, as boxes drawn and in COCO's format, reduced, or compared with plain."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import (
    add_ailurus,
    add_batch_size,
    add_compare,
    add_dataset,
    add_images,
    add_model,
    add_output,
    check_compare,
    load,
)

if TYPE_CHECKING:
    from PIL import Image

    from .batch import Batch

EXAMPLES = """
  ailurus-hf detect photos --model hustvl/yolos-small --keep-ratio 0.5 --output out
  ailurus-hf detect val2017 --model hustvl/yolos-small --compare --labels instances_val2017.json
"""
# Of all images: COCO's results, and which image and category each number in them is.
DETECTIONS, IMAGES = "detections.json", "detections_images.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_images(parser)
    add_dataset(parser)
    add_model(parser, lines=True)
    add_output(parser)
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="least score of a box that is shown (default: %(default)s)"
    )
    add_compare(parser, "AP", "annotations in COCO's format, a JSON file")
    add_batch_size(parser)
    add_ailurus(parser)


def run(args: argparse.Namespace) -> int:
    from ..evaluation.bad_input import BadInputError

    check_compare(args)
    if not 0 <= args.threshold <= 1:
        raise BadInputError(f"--threshold must be from 0 to 1, got {args.threshold}")
    from .clips import are_clips, detecting, run_clips

    if are_clips(args):
        return run_clips(args, "detect", "_boxes", lambda loaded: detecting(loaded, args.threshold))
    if args.compare:
        from ..evaluation.predictions import detected
        from .comparing import compare

        return compare(args, "detect", partial(detected, threshold=args.threshold), "AP")
    return _detect(args)


def _detect(args: argparse.Namespace) -> int:
    from ..evaluation.boxes import draw_boxes, find_boxes, names_and_colors, to_coco
    from ..evaluation.writing import save_text
    from . import predicting
    from .batch import Batch

    batch = Batch(args, ("_boxes.json", "_boxes.png"), together=(DETECTIONS, IMAGES))
    batch.write_together = lambda: _write_together(batch)
    if not batch.images:
        return batch.finish(None, images=[])
    loaded = load(args, "detect", batch.device)
    loaded.switch_on()
    folder, (names, palette) = batch.result_folder, names_and_colors(loaded)

    def finish(path: Path, image: Image.Image, outputs: Any) -> dict[str, Any]:
        boxes = find_boxes(loaded, outputs, image).above(args.threshold)
        files = folder.files(batch.names[path])
        found = to_coco(boxes, path.name, names)
        save_text(json.dumps(found, indent=1) + "\n", files[0])
        folder.save(draw_boxes(image, boxes, names, palette), files[1])
        return {"boxes": found, "files": [str(file) for file in files]}

    def shown(result: dict[str, Any]) -> str:
        boxes = [f"{box['category']} {box['score']:.0%}" for box in result["boxes"]]
        more = f" and {len(boxes) - 6} more" if len(boxes) > 6 else ""
        return f"{result['image']}: {', '.join(boxes[:6]) or 'nothing'}{more}"

    return predicting.run(batch, loaded, finish, shown, args.batch_size)


def _write_together(batch: Batch) -> None:
    """The boxes of all images in one file; read from those of each, for some were there already."""
    from ..evaluation.boxes import to_one_coco
    from ..evaluation.writing import save_text

    folder, found = batch.result_folder, {}
    for path, name in batch.names.items():
        file = folder.files(name)[0]
        boxes = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        found[str(name.with_name(path.name))] = boxes
    results, images = to_one_coco(found)
    lines = ",\n".join(json.dumps(each) for each in results)
    save_text(f"[\n{lines}\n]\n" if results else "[]\n", folder.path / DETECTIONS)
    save_text(json.dumps(images, indent=1) + "\n", folder.path / IMAGES)
