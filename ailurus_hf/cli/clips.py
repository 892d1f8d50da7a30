"""Clips in place of images: each frame through the model, what was drawn on it into a clip of the same name."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .arguments import existing, load, result_settings
from .launchers import launched
from .telling import print_json, reason_of, tell

if TYPE_CHECKING:
    from PIL import Image

    from ..evaluation.loading import LoadedModel
    from ..video import Clip

SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".avi", ".webm")
# From a frame and the model's outputs for it to the picture of it.
Draw = Callable[["Image.Image", Any], "Image.Image"]


def are_clips(args: argparse.Namespace) -> bool:
    """Whether the command was given clips. Raises BadInputError where it cannot take them so."""
    from ..evaluation.bad_input import BadInputError

    clips = [path for path in args.images if Path(path).suffix.lower() in SUFFIXES and not Path(path).is_dir()]
    if not clips:
        return False
    if len(clips) < len(args.images) or args.list or args.dataset:
        raise BadInputError(f"{clips[0]} is a clip: give clips alone, or images alone")
    if args.compare:
        raise BadInputError("--compare takes images: save a few frames of the clip, or use `ailurus-hf benchmark`")
    if launched().size > 1:
        raise BadInputError(f"clips are not shared out: {launched()} would write what the others do; start one process")
    return True


def run_clips(
    args: argparse.Namespace,
    task: Literal["segment", "depth", "detect"],
    ending: str,
    drawing: Callable[[LoadedModel], Callable[[], Draw]],
) -> int:
    """Every clip that can be read, one after the other; returns the exit code.

    Args:
        args: of the command, whose `images` are clips.
        ending: of the name of what is written, as "_overlay".
        drawing: from the model to what makes the drawing of one clip.
    """
    from ..evaluation.writing import as_read_again
    from ..video import check_output

    settings = as_read_again(result_settings(args))
    outputs = [check_output(output) for output in _outputs(args, ending, settings)]
    loaded = load(args, task)
    loaded.switch_on()
    new_draw = drawing(loaded)
    done, failed, skipped = [], [], []
    for path, output in zip(args.images, outputs, strict=True):
        if output.exists() and args.resume:
            skipped.append(path)
            continue
        try:
            result = _run_clip(loaded, path, output, new_draw(), settings)
        except Exception as error:
            if args.strict:
                raise
            failed.append({"clip": path, "error": " ".join(reason_of(path, error).split())})
            tell(f"ailurus-hf {args.command}: error: {failed[-1]['error']}")
            if args.json_lines:
                print(json.dumps(failed[-1]), flush=True)
            continue
        done.append(result)
        if args.json_lines:
            print(json.dumps(result), flush=True)
        elif not args.json:
            tokens = f", {result['tokens'][0]} → {result['tokens'][1]} tokens" if result["tokens"] else ""
            print(f"{path}: {result['frames']} frames, {result['ms']:.1f} ms of the model a frame{tokens}, {output}")
    if args.json and not args.json_lines:
        print_json(loaded, clips=done, skipped=skipped, failed=failed)
    return 1 if failed else 0


def _outputs(args: argparse.Namespace, ending: str, settings: dict[str, Any]) -> list[Path]:
    """Where each clip's result goes. Raises BadInputError where two would meet, or one is there and is not given up,
    or was made with other settings."""
    from ..evaluation.bad_input import BadInputError
    from ..evaluation.writing import check_mark
    from ..video import read_comment

    paths = [Path(path) for path in args.images]
    stems = [path.stem for path in paths]
    names = [path.name.replace(".", "_") if stems.count(path.stem) > 1 else path.stem for path in paths]
    if twice := [name for name in names if names.count(name) > 1]:
        raise BadInputError(
            f"two clips are called {twice[0]}: their results would have one name; give them in two calls"
        )
    outputs = [Path(args.output) / f"{name}{ending}.mp4" for name in names]
    there = [output for output in outputs if output.exists()]
    if there and existing(args) == "refuse":
        raise BadInputError(f"{there[0]} is there already: --overwrite replaces it, --resume leaves it")
    if args.resume:
        for output in there:
            check_mark(output, read_comment(output), settings)
    return outputs


def _run_clip(loaded: LoadedModel, path: str, output: Path, draw: Draw, settings: dict[str, Any]) -> dict[str, Any]:
    """Writes one clip, marked with the settings; returns its entry in the results."""
    from ..evaluation.paired import tokens_of
    from ..video import open_clip, write_video

    clip = open_clip(path)
    times: list[float] = []
    count = write_video(output, _drawn(loaded, clip, draw, times), clip.fps or 25, json.dumps(settings))
    tokens = tokens_of(loaded)
    return {
        "clip": path,
        "file": str(output),
        "frames": count,
        "ms": round(statistics.median(times), 3),
        "tokens": list(tokens) if any(tokens) else None,
    }


def _drawn(loaded: LoadedModel, clip: Clip, draw: Draw, times: list[float]) -> Iterator[Image.Image]:
    """The frames, drawn on; appends the milliseconds of the model of each."""
    from tqdm import tqdm

    from ..evaluation.paired import timed

    for frame in tqdm(clip, delay=2, disable=None, leave=False, unit="frame", desc=clip.path.name):
        outputs, ms = timed(loaded, loaded.prepare(frame))
        times.append(ms)
        yield draw(frame, outputs)


def segmenting(loaded: LoadedModel) -> Callable[[], Draw]:
    """Label maps over the frames."""
    from ..evaluation.comparison import label_map
    from ..visualization import class_palette, overlay_labels

    palette = class_palette(loaded.class_names())
    return lambda: lambda frame, outputs: overlay_labels(frame, label_map(loaded, outputs, frame), palette)


def detecting(loaded: LoadedModel, threshold: float) -> Callable[[], Draw]:
    """Boxes from a score on."""
    from ..evaluation.boxes import draw_boxes, find_boxes, names_and_colors

    classes = names_and_colors(loaded)

    def draw(frame: Image.Image, outputs: Any) -> Image.Image:
        return draw_boxes(frame, find_boxes(loaded, outputs, frame).above(threshold), *classes)

    return lambda: draw


def measuring_depth(loaded: LoadedModel, colors: Any) -> Callable[[], Draw]:
    """Depths in colors, from the least to the most of the clip so far, so that a clip does not flicker."""
    from ..evaluation.depth import colorize_depth, depth_map, widen

    def new_draw() -> Draw:
        seen: list[float] = []

        def draw(frame: Image.Image, outputs: Any) -> Image.Image:
            depth = depth_map(loaded, outputs, frame)
            widen(seen, depth)
            return colorize_depth(depth, seen[0], seen[1], colors)

        return draw

    return new_draw
