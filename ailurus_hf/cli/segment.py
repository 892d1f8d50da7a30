"""`ailurus-hf segment`: semantic segmentation of images, reduced, or compared with the model as it is."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import add_ailurus, add_batch_size, add_compare, add_images, add_model, add_output, check_compare, load

if TYPE_CHECKING:
    from PIL import Image

EXAMPLES = """
  ailurus-hf segment photos --model nvidia/segformer-b0-finetuned-ade-512-512 --output out
  ailurus-hf segment street.jpg --model my-segmenter --preset dense --compare --labels street_label.png
"""
ENDINGS = ("_labels.png", "_overlay.png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_images(parser)
    add_model(parser, lines=True)
    add_output(parser)
    add_compare(parser, "mIoU", "ground truth as class ids: a PNG, or a folder of PNGs named as the images")
    add_batch_size(parser)
    add_ailurus(parser)


def run(args: argparse.Namespace) -> int:
    check_compare(args)
    return _compare(args) if args.compare else _segment(args)


def _segment(args: argparse.Namespace) -> int:
    from ..evaluation.comparison import label_map, save_segmentation
    from .batch import Batch
    from .predicting import predict, tell_taken

    batch = Batch(args, ENDINGS)
    if not batch.images:
        return batch.finish(None, images=[])
    loaded = load(args, "segment")
    loaded.switch_on()
    names, folder = loaded.class_names(), batch.result_folder

    def finish(path: Path, image: Image.Image, outputs: Any) -> dict[str, Any]:
        files = folder.files(batch.names[path])
        classes = save_segmentation(image, label_map(loaded, outputs, image), names, files, folder.save)
        return {"classes": classes, "files": [str(file) for file in files]}

    def covered(result: dict[str, Any]) -> str:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in list(result["classes"].items())[:4])
        return f"{result['image']}: {shares}"

    taken = predict(batch, loaded, finish, covered, args.batch_size)
    batch.say(f"label maps and overlays in {args.output}")
    tell_taken(taken, batch)
    return batch.finish(loaded, images=batch.results, took=taken.to_dict())


def _compare(args: argparse.Namespace) -> int:
    from ..evaluation import comparison
    from ..evaluation.folders import read_labels
    from ..evaluation.paired import PairTable
    from ..evaluation.verdict import verdict
    from ..images import read_image
    from .batch import Batch, tell

    batch = Batch(args, ("_comparison.png",))
    if not batch.images:
        return batch.finish(None, images=[])
    loaded = load(args, "segment")
    num_classes, folder = len(loaded.class_names()), batch.result_folder
    compared: list[comparison.Comparison] = []
    table = PairTable([path.name for path in batch.images], "mIoU" if args.labels else None)

    def compare(path: Path) -> dict[str, Any]:
        image = read_image(path)
        truth = read_labels(path, args.labels, image.size, num_classes) if args.labels else None
        (file,) = folder.files(batch.names[path])
        compared.append(comparison.compare_image(loaded, path, image, truth, args.repeats, file, folder.save))
        return compared[-1].to_dict()

    def row(result: dict[str, Any]) -> str:
        line = table.row(Path(result["image"]).name, result)
        return f"{table.header()}\n{line}" if len(batch.results) == 1 else line

    batch.run(compare, row)
    summary = comparison.summarize(compared) if compared else None
    if summary and len(compared) > 1:
        batch.say(table.row("all", summary))
    batch.say(f"pictures in {args.output}")
    told = verdict(max(each.num_tokens for each in compared), summary["speedup"]) if summary else []
    if not (batch.json or batch.json_lines):
        for line in told:
            tell(line)
    return batch.finish(loaded, images=batch.results, all=summary, verdict=told)
