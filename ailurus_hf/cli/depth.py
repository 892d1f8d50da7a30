"""`ailurus-hf depth`: depth maps of images as 16-bit pictures and in color, reduced, or compared with plain."""

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
    add_model,
    add_output,
    check_compare,
    load,
)

if TYPE_CHECKING:
    from PIL import Image

EXAMPLES = """
  ailurus-hf depth photos --model depth-anything/Depth-Anything-V2-Small-hf --keep-ratio 0.5 --output out
  ailurus-hf depth street.jpg --model Intel/dpt-large --compare
"""
COLORS = ("viridis", "magma", "gray")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_images(parser)
    add_dataset(parser)
    add_model(parser, lines=True)
    add_output(parser)
    parser.add_argument("--colors", choices=COLORS, default="viridis", help="of the color maps (default: %(default)s)")
    add_compare(parser)
    add_batch_size(parser)
    add_ailurus(parser)


def run(args: argparse.Namespace) -> int:
    check_compare(args)
    from .clips import are_clips, measuring_depth, run_clips

    if are_clips(args):
        return run_clips(args, "depth", "_depth", lambda loaded: measuring_depth(loaded, args.colors))
    if args.compare:
        from ..evaluation.predictions import measured_depth
        from .comparing import compare

        return compare(args, "depth", partial(measured_depth, colors=args.colors), None)
    from ..evaluation.depth import colorize_depth, depth_map, depth_range, is_metric, to_16_bits
    from . import predicting
    from .batch import Batch

    batch = Batch(args, ("_depth.png", "_color.png"))
    if not batch.images:
        return batch.finish(None, images=[])
    loaded = load(args, "depth", batch.device)
    loaded.switch_on()
    folder, metric = batch.result_folder, is_metric(loaded.model.config)

    def finish(path: Path, image: Image.Image, outputs: Any) -> dict[str, Any]:
        depth = depth_map(loaded, outputs, image)
        limits, files = depth_range(depth, metric), folder.files(batch.names[path])
        folder.save(to_16_bits(depth, limits), files[0])
        folder.save(colorize_depth(depth, float(depth.min()), float(depth.max()), args.colors), files[1])
        return {"depth": limits._asdict(), "files": [str(file) for file in files]}

    def shown(result: dict[str, Any]) -> str:
        limits = result["depth"]
        unit = " m" if limits["metric"] else ""
        return f"{result['image']}: 0 to 65535 are {limits['low']:g} to {limits['high']:g}{unit}, {result['files'][0]}"

    return predicting.run(batch, loaded, finish, shown, args.batch_size)
