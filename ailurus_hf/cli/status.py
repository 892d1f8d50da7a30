"""`ailurus-hf status`: what is reduced where in a model, and what it saves."""

from __future__ import annotations

import argparse

from .arguments import add_ailurus, add_model, load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", nargs="?", help="image to run (default: noise of the model's size)")
    add_model(parser)
    add_ailurus(parser)


def run(args: argparse.Namespace) -> int:
    from .. import ailurus_status
    from ..evaluation.loading import noise_image
    from ..images import ImageError, read_image
    from .batch import FailedImageError
    from .telling import print_json

    try:
        image = read_image(args.image) if args.image else None
    except ImageError as error:
        raise FailedImageError(str(error)) from error
    loaded = load(args, None)
    loaded.switch_on()
    loaded(loaded.prepare(image or noise_image(loaded)))
    if args.json:
        print_json(loaded)
    else:
        print(ailurus_status(loaded.model))
    return 0
