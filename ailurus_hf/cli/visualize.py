"""`ailurus-hf visualize`: which tokens are merged, how many a cluster stands for, and what is left of the image."""

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
    from ..visualization import draw_sheet
    from .batch import Batch

    batch = Batch(args, ("_assignment.png", "_counts.png", "_rebuilt.png", "_clusters.png"))
    if not batch.images:
        return batch.finish(None, images=[])
    loaded = load(args, None, batch.device)
    loaded.switch_on()
    folder = batch.result_folder

    def visualize(path: Path) -> dict[str, Any]:
        found = loaded.draw_clusters(loaded.prepare(read_image(path)), args.fill)
        if not (panels := found.panels()):
            raise ImageError(f"{path.name} has {found.num_tokens} tokens and none are to be merged")
        files = folder.files(batch.names[path])
        sheet = draw_sheet(panels, heading=f"{path.name}: {loaded.setting()}")
        for picture, file in zip([*(panel.picture for panel in panels[1:]), sheet], files, strict=True):
            folder.save(picture, file)
        return {"tokens": [found.num_tokens, found.num_clusters], "files": [str(file) for file in files]}

    def drawn(result: dict[str, Any]) -> str:
        return f"{result['image']}: {' to '.join(map(str, result['tokens']))} tokens, {', '.join(result['files'])}"

    batch.run(visualize, drawn)
    if batch.gather({}) is None:
        return 0
    return batch.finish(loaded, images=batch.results)
