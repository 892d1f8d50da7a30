"""`ailurus-hf segment`: semantic segmentation of images, reduced, or compared with the model as it is."""

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
    add_model,
    add_output,
    check_compare,
    load,
)

if TYPE_CHECKING:
    from PIL import Image

    from ..evaluation.loading import LoadedModel
    from ..evaluation.report import Report
    from .batch import Batch

EXAMPLES = """
  ailurus-hf segment photos --model nvidia/segformer-b0-finetuned-ade-512-512 --output out
  ailurus-hf segment street.jpg --model my-segmenter --preset dense --compare --labels street_label.png
  ailurus-hf segment photos --model my-segmenter --preset dense --compare --report report.html
  ailurus-hf segment walk.mp4 --model my-segmenter --preset dense --output clips
"""
ENDINGS = ("_labels.png", "_overlay.png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_images(parser)
    add_dataset(parser)
    add_model(parser, lines=True)
    add_output(parser)
    add_compare(parser, "mIoU", "ground truth as class ids: a PNG, or a folder of PNGs named as the images")
    add_batch_size(parser)
    add_ailurus(parser)


def run(args: argparse.Namespace) -> int:
    check_compare(args)
    from .clips import are_clips, run_clips, segmenting

    if are_clips(args):
        return run_clips(args, "segment", "_overlay", segmenting)
    return _compare(args) if args.compare else _segment(args)


def _segment(args: argparse.Namespace) -> int:
    from ..evaluation.comparison import label_map, save_segmentation
    from . import predicting
    from .batch import Batch

    batch = Batch(args, ENDINGS)
    if not batch.images:
        return batch.finish(None, images=[])
    loaded = load(args, "segment", batch.device)
    loaded.switch_on()
    names, folder = loaded.class_names(), batch.result_folder

    def finish(path: Path, image: Image.Image, outputs: Any) -> dict[str, Any]:
        files = folder.files(batch.names[path])
        classes = save_segmentation(image, label_map(loaded, outputs, image), names, files, folder.save)
        return {"classes": classes, "files": [str(file) for file in files]}

    def covered(result: dict[str, Any]) -> str:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in list(result["classes"].items())[:4])
        return f"{result['image']}: {shares}"

    closing = f"label maps and overlays in {args.output}"
    return predicting.run(batch, loaded, finish, covered, args.batch_size, closing)


def _compare(args: argparse.Namespace) -> int:
    from ..evaluation.comparison import SegmentationPairs
    from .comparing import Scores, Work, adding, compare_images

    def begin(loaded: LoadedModel, batch: Batch, report: Report | None) -> tuple[Work, Scores]:
        pairs, folder = SegmentationPairs(loaded, args.labels, args.repeats), batch.result_folder

        def work(path: Path) -> dict[str, Any]:
            (file,) = folder.files(batch.names[path])
            result, picture = pairs.compare(path, batch.read(path), adding(report, batch, path))
            folder.save(picture, file)
            return {**result, "file": str(file)}

        return work, pairs.scores

    return compare_images(args, "segment", "mIoU", begin, f"pictures in {args.output}")
