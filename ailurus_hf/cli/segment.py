"""`ailurus-hf segment`: semantic segmentation of images, reduced, or compared with the model as it is."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import add_ailurus, add_images, add_model, add_output, load, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_images(parser)
    add_model(parser)
    add_output(parser)
    parser.add_argument(
        "--compare",
        action="store_true",
        help="run plain beside reduced: times, agreement, one picture; mIoU with --labels",
    )
    parser.add_argument(
        "--labels", help="ground truth as class ids: a PNG, or a folder of PNGs named as the images (with --compare)"
    )
    parser.add_argument("--repeats", type=positive, default=5, help="timed runs of each (default: %(default)s)")
    add_ailurus(parser)


def run(args: argparse.Namespace) -> int:
    from ..evaluation import comparison
    from ..evaluation.folders import read_labels
    from ..evaluation.loading import BadInputError
    from ..evaluation.writing import make_folder
    from ..images import read_image
    from .batch import Batch

    if args.labels and not args.compare:
        raise BadInputError("--labels is for --compare: without it nothing is scored")
    if args.compare and args.no_ailurus:
        raise BadInputError("--compare and --no-ailurus do not go together: nothing to compare")
    batch = Batch(args)
    if not batch.images:
        return batch.finish(None, images=[])
    output = make_folder(args.output)
    loaded = load(args, "segment")
    num_classes = len(loaded.class_names())
    compared: list[comparison.Comparison] = []

    def segment(path: Path) -> dict[str, Any]:
        return comparison.segment_image(loaded, path, read_image(path), output / batch.names[path])

    def compare(path: Path) -> dict[str, Any]:
        image = read_image(path)
        truth = read_labels(path, args.labels, image.size, num_classes) if args.labels else None
        results = output / batch.names[path]
        compared.append(comparison.compare_image(loaded, path, image, truth, args.repeats, results))
        return compared[-1].to_dict()

    def covered(result: dict[str, Any]) -> str:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in list(result["classes"].items())[:4])
        return f"{result['image']}: {shares}"

    if not args.compare:
        loaded.switch_on()
        batch.run(segment, covered)
        if batch.results and not args.json:
            print(f"label maps and overlays in {output}")
        return batch.finish(loaded, images=batch.results)
    batch.run(compare, lambda result: None)
    if compared and not args.json:
        print(comparison.format_comparison(compared))
        print(f"pictures in {output}")
    summary = comparison.summarize(compared) if compared else None
    return batch.finish(loaded, images=batch.results, all=summary)
