"""`ailurus-hf visualize`: pictures of which tokens are merged and what is left of the image."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import add_ailurus, add_images, add_model, add_output, load

EXAMPLES = """
  ailurus-hf visualize street.jpg --model facebook/dinov2-small --keep-ratio 0.25 --output out
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_images(parser)
    add_model(parser, lines=True)
    add_output(parser)
    parser.add_argument(
        "--fill", choices=("mean", "distinct"), default="mean", help="color of a cluster (default: %(default)s)"
    )
    add_ailurus(parser, can_be_off=False)


def run(args: argparse.Namespace) -> int:
    from ..images import ImageError, read_image
    from .batch import Batch

    batch = Batch(args, ("_assignment.png", "_rebuilt.png"))
    if not batch.images:
        return batch.finish(None, images=[])
    loaded = load(args, None, batch.device)
    loaded.switch_on()
    folder = batch.result_folder

    def visualize(path: Path) -> dict[str, Any]:
        pictures = loaded.draw_clusters(loaded.prepare(read_image(path)), args.fill)
        if pictures.assignment is None or pictures.rebuilt is None:
            raise ImageError(f"{path.name} has {pictures.num_tokens} tokens and none are to be merged")
        files = folder.files(batch.names[path])
        for picture, file in zip((pictures.assignment, pictures.rebuilt), files, strict=True):
            folder.save(picture, file)
        return {"tokens": [pictures.num_tokens, pictures.num_clusters], "files": [str(file) for file in files]}

    def drawn(result: dict[str, Any]) -> str:
        return f"{result['image']}: {' to '.join(map(str, result['tokens']))} tokens, {', '.join(result['files'])}"

    batch.run(visualize, drawn)
    if batch.gather({}) is None:
        return 0
    return batch.finish(loaded, images=batch.results)
