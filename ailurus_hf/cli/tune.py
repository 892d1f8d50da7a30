"""`ailurus-hf tune`: the fastest setting within a loss, or the nearest at a speed, for one's own model and images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .arguments import add_images, add_model, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_images(parser)
    add_model(parser)
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument("--max-loss", type=float, metavar="X", help="the fastest setting that loses at most this (0.01)")
    goal.add_argument("--speedup", type=float, metavar="X", help="the setting that loses least at this speed-up")
    goal.add_argument("--pareto", action="store_true", help="the front of speed and loss")
    parser.add_argument("--limit", type=positive, default=32, help="images to look at (default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=2, help="passes at most (default: %(default)s)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="the result, for --config of the other commands")
    parser.add_argument(
        "--save-model",
        type=Path,
        metavar="FOLDER",
        help="the model, its setting, and a model card of what it saves",
    )
    parser.add_argument("--push-to-hub", metavar="NAME", help="the same as a repository on the Hub, such as me/reduced")


def run(args: argparse.Namespace) -> int:
    from ..errors import AiluRusError
    from ..evaluation.autotune import goal_of, tune
    from ..evaluation.loading import load_model
    from ..evaluation.tuned_models import ModelSubject
    from ..images import read_image
    from .batch import Batch

    if args.max_loss is None and args.speedup is None and not args.pareto:
        args.max_loss = 0.01
    goal = goal_of(args.speedup, args.max_loss, args.pareto)
    if args.save is not None and not args.save.parent.is_dir():
        raise AiluRusError(f"no folder {args.save.parent} to save {args.save.name} in")
    if args.save_model is not None and args.save_model.exists() and any(args.save_model.iterdir()):
        raise AiluRusError(f"{args.save_model} is there already: give --save-model a new folder")
    batch = Batch(args)
    if not batch.images:
        return batch.finish(None, num_images=0)
    loaded = load_model(args.model, None, args.device, args.dtype, None)
    inputs: list[dict[str, Any]] = []

    def prepare(path: Path) -> dict[str, Any]:
        if len(inputs) < args.limit:
            inputs.append(loaded.prepare(read_image(path)))
        return {}

    batch.run(prepare, lambda result: None)
    if not inputs:
        return batch.finish(loaded, num_images=0)
    subject = ModelSubject(loaded.model, inputs, forward=loaded)
    tuned = tune(subject, goal, rounds=args.rounds, progress=sys.stderr.isatty())
    if not args.json:
        print(tuned, flush=True)  # before the Hub is asked, which may refuse
    if args.save is not None:
        tuned.save(args.save)
    if args.save_model is not None:
        tuned.save_pretrained(loaded.model, args.save_model, processor=loaded.processor)
    if args.push_to_hub is not None:
        tuned.push_to_hub(loaded.model, args.push_to_hub, processor=loaded.processor)
    return batch.finish(loaded, num_images=len(inputs), tuned=tuned.to_dict())
