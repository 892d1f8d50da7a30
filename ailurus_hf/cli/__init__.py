"""The `ailurus-hf` command: see what token reduction does to your model on your images, without writing code.

Bad input gives one line on stderr and exit code 2. torch and transformers are imported by the commands that need
them, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..config import CLUSTERINGS, RESTORE_PLACES, RESTORES
from ..errors import AiluRusError
from . import video as cli_video

if TYPE_CHECKING:
    from .support import LoadedModel

MAX_ERROR_LENGTH = 500
AILURUS_FIELDS = (
    "cluster_location",
    "keep_ratio",
    "num_clusters",
    "clustering",
    "restore",
    "restore_at",
    "restore_location",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0 done, 1 the self-check of `doctor` failed, 2 bad input."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except AiluRusError as error:
        message = " ".join(str(error).split())
        if len(message) > MAX_ERROR_LENGTH:  # a wrong checkpoint names hundreds of weights
            message = f"{message[:MAX_ERROR_LENGTH]} …"
        print(f"ailurus-hf {args.command}: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")  # one line, no usage before it


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ailurus-hf", description="AiluRus token reduction for Hugging Face vision transformers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    segment = commands.add_parser("segment", help="semantic segmentation of images, reduced or compared with plain")
    _add_images(segment)
    _add_model(segment)
    _add_ailurus(segment)
    segment.add_argument("--output", default="ailurus_output", help="folder for the pictures (default: %(default)s)")
    segment.add_argument(
        "--compare",
        action="store_true",
        help="run plain beside reduced: times, agreement, one picture; mIoU with --labels",
    )
    segment.add_argument(
        "--labels", help="ground truth as class ids: a PNG, or a folder of PNGs named as the images (with --compare)"
    )
    segment.add_argument("--repeats", type=_positive, default=5, help="timed runs of each (default: %(default)s)")
    segment.set_defaults(run=_segment)

    classify = commands.add_parser("classify", help="classify images")
    _add_images(classify)
    _add_model(classify)
    _add_ailurus(classify)
    classify.add_argument("--top", type=_positive, default=3, help="classes to show (default: %(default)s)")
    classify.set_defaults(run=_classify)

    benchmark = commands.add_parser("benchmark", help="speed and fidelity of several settings on your model and images")
    _add_images(benchmark)
    _add_model(benchmark)
    benchmark.add_argument(
        "--methods", nargs="+", default=["density-peaks", "local-kmeans"], help="default: %(default)s"
    )
    benchmark.add_argument("--keep", nargs="+", type=float, default=[0.5, 0.25], help="ratios (default: %(default)s)")
    benchmark.add_argument("--locations", nargs="+", type=int, default=[2], help="layers (default: %(default)s)")
    benchmark.add_argument("--repeats", type=_positive, default=7, help="timed rounds (default: %(default)s)")
    benchmark.set_defaults(run=_benchmark)

    visualize = commands.add_parser("visualize", help="draw which tokens were merged and what is left of the image")
    _add_images(visualize)
    _add_model(visualize)
    _add_ailurus(visualize, can_be_off=False)
    visualize.add_argument("--output", default="ailurus_output", help="folder for the pictures (default: %(default)s)")
    visualize.add_argument("--fill", choices=("mean", "distinct"), default="mean", help="color of a cluster")
    visualize.set_defaults(run=_visualize)

    status = commands.add_parser("status", help="what is reduced where in a model, and what it saves")
    status.add_argument("image", nargs="?", help="image to run; default: noise of the model's size")
    _add_model(status)
    _add_ailurus(status)
    status.set_defaults(run=_status)

    video = commands.add_parser("video", help="text to video along a clip's motion (ControlVideo), reduced or compared")
    _add_model(video)
    cli_video.add_options(video, _positive)
    video.set_defaults(run=cli_video.run)

    doctor = commands.add_parser("doctor", help="versions, extras, devices, attention kernels, and a self-check")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_doctor)

    convert = commands.add_parser(
        "convert-segmenter", help="convert an official Segmenter checkpoint (variant.yml beside it) to a model folder"
    )
    convert.add_argument("checkpoint", help="checkpoint.pth")
    convert.add_argument("output_dir", help="folder to write")
    convert.set_defaults(run=_convert_segmenter)
    return parser


def _add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", help="image files, or folders of them")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="model folder or Hub name")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: the first there is)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_ailurus(parser: argparse.ArgumentParser, can_be_off: bool = True) -> None:
    group = parser.add_argument_group("AiluRus", "default: what the model's config.json says, else keep half")
    group.add_argument("--cluster-location", type=int, metavar="L", help="merge at the output of this layer")
    size = group.add_mutually_exclusive_group()
    size.add_argument("--keep-ratio", type=float, metavar="R", help="share of the tokens to keep, in (0, 1]")
    size.add_argument("--num-clusters", type=int, metavar="M", help="number of tokens to keep")
    group.add_argument("--clustering", choices=CLUSTERINGS)
    group.add_argument("--restore", choices=RESTORES, help="what a token gets back")
    group.add_argument("--restore-at", choices=RESTORE_PLACES, help="where a segmenter unmerges")
    group.add_argument("--restore-location", type=int, metavar="R", help="layer from which all tokens run again")
    if can_be_off:
        group.add_argument("--no-ailurus", action="store_true", help="run the model as it is")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _load(args: argparse.Namespace, task: str | None) -> LoadedModel:
    from .support import BadInputError, load_model

    given = {name: getattr(args, name) for name in AILURUS_FIELDS if getattr(args, name) is not None}
    if not getattr(args, "no_ailurus", False):
        return load_model(args.model, task, args.device, args.dtype, given)
    if given:
        raise BadInputError(f"--no-ailurus and --{next(iter(given)).replace('_', '-')} do not go together")
    return load_model(args.model, task, args.device, args.dtype, None)


def _segment(args: argparse.Namespace) -> int:
    from ..evaluation import comparison
    from . import support

    if args.labels and not args.compare:
        raise support.BadInputError("--labels is for --compare: without it nothing is scored")
    if args.compare and args.no_ailurus:
        raise support.BadInputError("--compare and --no-ailurus do not go together: nothing to compare")
    images = support.find_images(args.images)
    loaded = _load(args, "segment")
    output = support.make_folder(args.output)
    if not args.compare:
        loaded.switch_on()
        results = [
            comparison.segment_image(loaded, path, support.read_image(path), output)
            for path in support.progress(images)
        ]
        if args.json:
            _print_json(loaded, images=results)
            return 0
        for result in results:
            covered = ", ".join(f"{name} {share:.0%}" for name, share in list(result["classes"].items())[:4])
            print(f"{result['image']}: {covered}")
        print(f"label maps and overlays in {output}")
        return 0

    compared = []
    for path in support.progress(images):
        image = support.read_image(path)
        truth = support.read_labels(path, args.labels, image.size) if args.labels else None
        compared.append(comparison.compare_image(loaded, path, image, truth, args.repeats, output))
    if args.json:
        _print_json(loaded, images=[c.to_dict() for c in compared], all=comparison.summarize(compared))
        return 0
    print(comparison.format_comparison(compared))
    print(f"pictures in {output}")
    return 0


def _classify(args: argparse.Namespace) -> int:
    from . import support

    images = support.find_images(args.images)
    loaded = _load(args, "classify")
    loaded.switch_on()
    names = loaded.class_names()
    results: list[dict[str, Any]] = []
    for path in support.progress(images):
        logits = loaded(loaded.prepare(support.read_image(path))).logits[0].float()
        best = logits.softmax(0).topk(min(args.top, len(names)))
        scores = {names[int(i)]: round(float(score), 4) for score, i in zip(*best, strict=True)}
        results.append({"image": str(path), "scores": scores})
    if args.json:
        _print_json(loaded, images=results)
    else:
        for result in results:
            print(f"{result['image']}: " + ", ".join(f"{name} {score:.1%}" for name, score in result["scores"].items()))
    return 0


def _benchmark(args: argparse.Namespace) -> int:
    from ..evaluation import benchmark
    from ..evaluation.timing import measured_on
    from . import support

    configs = benchmark.settings(args.methods, args.locations, args.keep)
    images = support.find_images(args.images)
    loaded = support.load_model(args.model, None, args.device, args.dtype, None)
    rows = benchmark.benchmark(loaded, images, configs, args.repeats, support.progress)
    if args.json:
        machine = measured_on(loaded.device, str(loaded.dtype).removeprefix("torch."))
        _print_json(loaded, num_images=len(images), measured_on=machine, rows=[row.to_dict() for row in rows])
    else:
        print(benchmark.as_markdown(rows))
    return 0


def _visualize(args: argparse.Namespace) -> int:
    from . import support

    images = support.find_images(args.images)
    loaded = _load(args, None)
    output = support.make_folder(args.output)
    loaded.switch_on()
    results: list[dict[str, Any]] = []
    for path in support.progress(images):
        pictures = loaded.draw_clusters(loaded.prepare(support.read_image(path)), args.fill)
        if pictures.assignment is None or pictures.rebuilt is None:
            raise support.BadInputError(f"{path.name} has {pictures.num_tokens} tokens and none are to be merged")
        files = [output / f"{path.stem}_assignment.png", output / f"{path.stem}_rebuilt.png"]
        pictures.assignment.save(files[0])
        pictures.rebuilt.save(files[1])
        tokens = [pictures.num_tokens, pictures.num_clusters]
        results.append({"image": str(path), "tokens": tokens, "files": [str(file) for file in files]})
    if args.json:
        _print_json(loaded, images=results)
    else:
        for result in results:
            print(f"{result['image']}: {' to '.join(map(str, result['tokens']))} tokens, {', '.join(result['files'])}")
    return 0


def _status(args: argparse.Namespace) -> int:
    from .. import ailurus_status
    from . import support

    loaded = _load(args, None)
    loaded.switch_on()
    loaded(loaded.prepare(support.read_image(Path(args.image)) if args.image else support.noise_image(loaded)))
    if args.json:
        _print_json(loaded)
    else:
        print(ailurus_status(loaded.model))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from . import doctor

    found = doctor.report()
    print(json.dumps(found, indent=2) if args.json else doctor.format_report(found))
    return 1 if found["self_check"]["ok"] is False else 0


def _convert_segmenter(args: argparse.Namespace) -> int:
    from .support import BadInputError, require_transformers

    require_transformers()
    from ..segmenter import convert_segmenter_checkpoint

    if Path(args.output_dir).is_file():
        raise BadInputError(f"{args.output_dir} is a file; the model needs a folder")
    try:
        convert_segmenter_checkpoint(args.checkpoint, args.output_dir)
    except (ValueError, OSError) as error:
        raise BadInputError(str(error)) from error
    print(f"model folder {args.output_dir}")
    return 0


def _print_json(loaded: LoadedModel, **fields: Any) -> None:
    from .. import ailurus_status

    found = {
        "model": loaded.name,
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "ailurus": ailurus_status(loaded.model).to_dict() if loaded.ailurus else None,
    }
    print(json.dumps(found | fields, indent=2))


if __name__ == "__main__":
    sys.exit(main())
