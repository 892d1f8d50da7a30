"""`ailurus-hf convert-segmenter`: an official Segmenter checkpoint to a model folder of transformers."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="checkpoint.pth")
    parser.add_argument("output_dir", help="folder to write")


def run(args: argparse.Namespace) -> int:
    from ..evaluation.loading import BadInputError
    from ..segmenter import convert_segmenter_checkpoint

    if Path(args.output_dir).is_file():
        raise BadInputError(f"{args.output_dir} is a file; the model needs a folder")
    try:
        convert_segmenter_checkpoint(args.checkpoint, args.output_dir)
    except (ValueError, OSError) as error:
        raise BadInputError(str(error)) from error
    print(f"model folder {args.output_dir}")
    return 0
