"""Arguments that several commands share, and the model that they describe.

Presets, clusterings and a clustering's settings are read from the library: one that is registered has its options here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..choices import CLUSTERING_CLASSES, RESTORES, RESTORES_AT, clustering_names
from ..presets import VISION_PRESETS

if TYPE_CHECKING:
    from ..evaluation.loading import LoadedModel
    from ..evaluation.writing import Existing

AILURUS_FIELDS = (
    "cluster_location",
    "keep_ratio",
    "num_clusters",
    "clustering",
    "restore",
    "restore_at",
    "restore_location",
    "min_keep_ratio",
    "stages",
    "compile_clustering",
)

COMPILE_CLUSTERING: dict[str, Any] = {
    "action": "store_true",
    "default": None,
    "help": "run the clustering through torch.compile, for a GPU; the first image of each size takes seconds longer",
}

# Options that decide nothing about a result.
NO_SETTINGS = {
    *("run", "images", "list", "rows", "streaming", "recursive", "strict", "output", "overwrite", "resume"),
    *("json", "json_lines", "device", "batch_size", "repeats", "report"),
}


def add_images(parser: argparse.ArgumentParser) -> None:
    """Images and folders of them, and what happens where one cannot be read."""
    parser.add_argument("images", nargs="*", help="image files, or folders of them")
    parser.add_argument("--list", metavar="FILE", help="images, or folders of them, of a text file: a path a line")
    parser.add_argument("--recursive", action="store_true", help="look into subfolders too")
    parser.add_argument(
        "--strict", action="store_true", help="stop at the first image that fails (default: name it, do the others)"
    )


def add_dataset(parser: argparse.ArgumentParser) -> None:
    """Images of a data set, in place of files."""
    group = parser.add_argument_group("data sets", 'needs pip install "ailurus-hf[datasets]"')
    group.add_argument("--dataset", metavar="NAME", help="of the Hub, or a folder, as `datasets` loads it")
    group.add_argument("--split", default="train", help="of the data set (default: %(default)s)")
    group.add_argument("--column", help="that holds the images (default: the only one that does)")
    group.add_argument("--streaming", action="store_true", help="read rows as they come and store none")
    group.add_argument("--rows", type=positive, metavar="N", help="only the first N rows (default: all)")


def add_output(
    parser: argparse.ArgumentParser, what: str = "folder for the pictures", default: str | None = "ailurus_output"
) -> None:
    """Where results go, and what becomes of those that are there."""
    shown = " (default: %(default)s)" if default else ""
    parser.add_argument("--output", default=default, help=what + shown)
    there = parser.add_mutually_exclusive_group()
    there.add_argument("--overwrite", action="store_true", help="replace results that are there (default: refuse)")
    there.add_argument("--resume", action="store_true", help="skip what the output has already, of the same settings")


def add_model(parser: argparse.ArgumentParser, lines: bool = False) -> None:
    parser.add_argument("--model", required=True, help="model folder or Hub name")
    add_device(parser)
    add_json(parser, lines)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where a model runs, and in which type."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: the first there is)")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="default: %(default)s"
    )


def add_compare(parser: argparse.ArgumentParser, metric: str = "", labels: str = "") -> None:
    """Plain beside reduced, and what both are scored against."""
    parser.add_argument(
        "--compare",
        action="store_true",
        help="run plain beside reduced: times, agreement, one picture"
        + (f"; {metric} with --labels" if metric else ""),
    )
    if metric:
        parser.add_argument("--labels", help=f"{labels} (with --compare)")
    else:
        parser.set_defaults(labels=None)
    parser.add_argument("--repeats", type=positive, default=5, help="timed runs of each (default: %(default)s)")
    parser.add_argument(
        "--report", metavar="FILE", help="page with sliders, report.html: one file, of up to 50 images (with --compare)"
    )


def check_compare(args: argparse.Namespace) -> None:
    """Raises BadInputError where options of `add_compare` do not go with the others."""
    from ..evaluation.bad_input import BadInputError
    from .launchers import launched

    if args.report:
        if not args.compare:
            raise BadInputError("--report is for --compare: without it there is nothing to compare")
        if args.resume:
            raise BadInputError("--report and --resume do not go together: the page would lack what is done already")
        if (processes := launched().size) > 1:
            raise BadInputError(f"--report is written by one process, and {processes} were started")
        if Path(args.report).is_dir():
            raise BadInputError(f"--report {args.report} is a folder: name a file, such as report.html")
        if Path(args.report).exists() and not args.overwrite:
            raise BadInputError(f"{args.report} is there already: --overwrite replaces it, --report names another file")
    if args.labels and not args.compare:
        raise BadInputError("--labels is for --compare: without it nothing is scored")
    if args.compare and args.no_ailurus:
        raise BadInputError("--compare and --no-ailurus do not go together: nothing to compare")


def add_labels_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--labels-text",
        nargs="+",
        metavar="TEXT",
        help="classes in words, for models that compare images with texts (CLIP, SigLIP)",
    )


def add_batch_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=1,
        metavar="B",
        help="images of one size that run at once (default: %(default)s)",
    )


def add_json(parser: argparse.ArgumentParser, lines: bool = False) -> None:
    """--json, and for commands that go through images --json-lines."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--json", action="store_true", help="print JSON, at the end")
    if lines:
        group.add_argument(
            "--json-lines", action="store_true", help="print a line of JSON for each image as it is done"
        )


def add_ailurus(parser: argparse.ArgumentParser, can_be_off: bool = True) -> None:
    """How tokens are reduced: fields of AiluRusConfig and settings of its clustering. Called after all others."""
    group = parser.add_argument_group("AiluRus", "default: what the model's config.json says, else keep half")
    add_preset(group, VISION_PRESETS)
    add_config(group)
    group.add_argument(
        "--cluster-location",
        type=numbers(int),
        metavar="L",
        help="merge after this layer; 0: the embeddings; 1,3: twice",
    )
    size = group.add_mutually_exclusive_group()
    size.add_argument(
        "--keep-ratio", type=numbers(float), metavar="R", help="share of the tokens to keep, in (0, 1]; one a location"
    )
    size.add_argument("--num-clusters", type=numbers(int), metavar="M", help="number of tokens to keep; one a location")
    add_clustering(group)
    group.add_argument("--restore", choices=RESTORES, help="the value that a token gets when it is unmerged")
    group.add_argument("--restore-at", choices=RESTORES_AT, help="where the tokens of a segmenter are unmerged")
    group.add_argument("--restore-location", type=int, metavar="R", help="all tokens run again after this layer")
    group.add_argument(
        "--min-keep-ratio", type=float, metavar="R", help="keep down to this share where an image has little detail"
    )
    group.add_argument(
        "--stages", type=numbers(int), metavar="S", help="of a model in stages (SegFormer), those to reduce; 3 or 2,3"
    )
    group.add_argument("--compile-clustering", **COMPILE_CLUSTERING)
    if can_be_off:
        group.add_argument("--no-ailurus", action="store_true", help="run the model as it is")


def add_preset(group: Any, presets: Iterable[str]) -> None:
    group.add_argument("--preset", choices=tuple(presets), help="measured settings; the other options replace some")


def add_config(group: Any) -> None:
    group.add_argument("--config", metavar="FILE", help="saved settings, JSON; the other options replace some")


def read_config(path: str) -> dict[str, Any]:
    """The fields of a saved config: of the file that `save` of a config or of a result of `autotune` writes.

    Raises:
        BadInputError: it cannot be read, or holds no JSON object.
        AiluRusError: it is a result for a diffusion network.
    """
    from ..config import AiluRusConfig
    from ..evaluation.bad_input import BadInputError

    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInputError(f"cannot read --config {path}: {error.strerror}") from error
    except ValueError as error:
        raise BadInputError(f"--config {path} is no JSON: {error}") from error
    fields = AiluRusConfig.chosen(found) if isinstance(found, dict) else found
    if not isinstance(fields, dict):
        raise BadInputError(f"--config {path} must hold an object of settings, got {type(fields).__name__}")
    return fields


def add_clustering(group: Any, prefix: str = "") -> None:
    """--clustering, and an option for each setting that a registered clustering has.

    Args:
        group: what the options are added to.
        prefix: what their long names begin with, such as "ailurus-"; the short ones are there as well.
    """
    both = ("",) if not prefix else ("", prefix)
    group.add_argument(
        *(f"--{start}clustering" for start in both),
        choices=clustering_names(),
        dest=f"{prefix}clustering".replace("-", "_"),
        help="how tokens are clustered",
    )
    for name, defaults in clustering_settings().items():
        help = "; ".join(f"{owner}: {default}" for owner, default in defaults.items())
        kind = type(next(iter(defaults.values())))
        options = [f"--{start}{name.replace('_', '-')}" for start in both]
        fields = {"type": kind, "metavar": "X", "dest": f"clustering_{name}", "help": f"setting of {help}"}
        try:
            group.add_argument(*options, **fields)
        except argparse.ArgumentError:  # a command has an option of that name
            group.add_argument(f"--clustering-{name.replace('_', '-')}", **fields)


def clustering_settings() -> dict[str, dict[str, Any]]:
    """The settings of all registered clusterings that are numbers or words: {setting: {clustering: its default}}."""
    from .. import clustering  # noqa: F401  (registers those of the package)

    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for name in clustering_names():
        for field in dataclasses.fields(CLUSTERING_CLASSES[name]):
            if type(field.default) in (int, float, str):
                found[field.name][name] = field.default
    return found


def given_clustering(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of a clustering that were given."""
    given = {name: getattr(args, f"clustering_{name}", None) for name in clustering_settings()}
    return {name: value for name, value in given.items() if value is not None}


def numbers(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """A number, or several with commas between them as a tuple."""

    def parse(text: str) -> Any:
        try:
            values = tuple(map(kind, text.split(",")))
        except ValueError as error:
            word = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {word}, nor several like 1,3") from error
        return values if len(values) > 1 else values[0]

    return parse


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def existing(args: argparse.Namespace) -> Existing:
    """What becomes of results that are there already."""
    return "overwrite" if args.overwrite else "resume" if args.resume else "refuse"


def result_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options that decide what a result is: those that were given or have a default, but not where images come
    from, where results go, and how they are told."""
    of_rows = set() if getattr(args, "dataset", None) else {"split", "column"}
    left_out = NO_SETTINGS | of_rows
    given = {k: v for k, v in sorted(vars(args).items()) if k not in left_out and v not in (None, False)}
    return {**given, "config": read_config(args.config)} if given.get("config") else given


def load(args: argparse.Namespace, task: str | None, device: str | None = None) -> LoadedModel:
    """The model of `add_model`, to be reduced as `add_ailurus` says; on another device than --device where one
    is given. Raises BadInputError."""
    from ..evaluation.loading import BadInputError, load_model

    device = device or args.device
    given = {name: getattr(args, name) for name in AILURUS_FIELDS if getattr(args, name) is not None}
    if isinstance(given.get("stages"), int):
        given["stages"] = (given["stages"],)
    settings = given_clustering(args)
    saved = read_config(args.config) if args.config else None
    if args.config and args.preset:
        raise BadInputError("--config and --preset do not go together: both are whole settings")
    if getattr(args, "batch_size", 1) > 1 and "min_keep_ratio" in given:
        raise BadInputError("--min-keep-ratio keeps another number of tokens for each image: use --batch-size 1")
    texts = getattr(args, "labels_text", None)
    if not getattr(args, "no_ailurus", False):
        return load_model(args.model, task, device, args.dtype, given, args.preset, settings, texts, saved)
    if named := [*given, *settings, *(name for name in ("preset", "config") if getattr(args, name))]:
        raise BadInputError(f"--no-ailurus and --{named[0].replace('_', '-')} do not go together")
    return load_model(args.model, task, device, args.dtype, None, labels_text=texts)
