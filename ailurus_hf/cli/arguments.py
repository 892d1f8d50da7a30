"""Arguments that several commands share, and the model that they describe."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..config import RESTORES, RESTORES_AT, clustering_names

if TYPE_CHECKING:
    from ..evaluation.loading import LoadedModel

AILURUS_FIELDS = (
    "cluster_location",
    "keep_ratio",
    "num_clusters",
    "clustering",
    "restore",
    "restore_at",
    "restore_location",
)


def add_images(parser: argparse.ArgumentParser) -> None:
    """Images and folders of them, and what happens where one cannot be read."""
    parser.add_argument("images", nargs="+", help="image files, or folders of them")
    parser.add_argument("--recursive", action="store_true", help="look into subfolders too")
    parser.add_argument(
        "--strict", action="store_true", help="stop at the first image that fails (default: name it, do the others)"
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default="ailurus_output", help="folder for the pictures (default: %(default)s)")


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="model folder or Hub name")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: the first there is)")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="default: %(default)s"
    )
    add_json(parser)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_ailurus(parser: argparse.ArgumentParser, can_be_off: bool = True) -> None:
    """How tokens are reduced: fields of AiluRusConfig."""
    group = parser.add_argument_group("AiluRus", "default: what the model's config.json says, else keep half")
    group.add_argument("--cluster-location", type=int, metavar="L", help="merge after this layer; 0: the embeddings")
    size = group.add_mutually_exclusive_group()
    size.add_argument("--keep-ratio", type=float, metavar="R", help="share of the tokens to keep, in (0, 1]")
    size.add_argument("--num-clusters", type=int, metavar="M", help="number of tokens to keep")
    group.add_argument("--clustering", choices=clustering_names(), help="how tokens are clustered")
    group.add_argument("--restore", choices=RESTORES, help="the value that a token gets when it is unmerged")
    group.add_argument("--restore-at", choices=RESTORES_AT, help="where the tokens of a segmenter are unmerged")
    group.add_argument("--restore-location", type=int, metavar="R", help="all tokens run again after this layer")
    if can_be_off:
        group.add_argument("--no-ailurus", action="store_true", help="run the model as it is")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def load(args: argparse.Namespace, task: str | None) -> LoadedModel:
    """The model of `add_model`, to be reduced as `add_ailurus` says. Raises BadInputError."""
    from ..evaluation.loading import BadInputError, load_model

    given = {name: getattr(args, name) for name in AILURUS_FIELDS if getattr(args, name) is not None}
    if not getattr(args, "no_ailurus", False):
        return load_model(args.model, task, args.device, args.dtype, given)
    if given:
        raise BadInputError(f"--no-ailurus and --{next(iter(given)).replace('_', '-')} do not go together")
    return load_model(args.model, task, args.device, args.dtype, None)
