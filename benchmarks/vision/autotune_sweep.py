"""How near `autotune` comes to the best of an exhaustive sweep, and how long it takes: a Segmenter on CamVid.

    python -m benchmarks.vision.autotune_sweep --data CAMVID
    python -m benchmarks.vision.autotune_sweep --data CAMVID --limit 32 --max-loss 0.02 0.04 --speedup 2.5

The sweep runs every setting that autotune searches over on every image, or every few of them (--every), in turns with
the plain model; autotune runs before it, on all images. Speed and loss of its pick are compared as the sweep measured
them, so that both are judged by the same runs; --against takes a sweep that this device made before. Loss is the share
of pixels that get another label than from the plain model.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ailurus_hf import SegmenterForSemanticSegmentation, SegmenterImageProcessor
from ailurus_hf.evaluation.autotune import tune
from ailurus_hf.evaluation.search import Candidate, Goal, Measuring, choose, usable
from ailurus_hf.evaluation.tuned_models import ModelSubject

from ..harness import environment, markdown, save
from ..harness.datasets import SegmentationData
from .segmenter_quality import SHIPPED

COLUMNS = {
    "goal": "goal",
    "seconds": "autotune|{:.0f} s",
    "confident": "sure",
    "pick": "its pick",
    "pick_speed_up": "speed-up|{:.2f}×",
    "pick_loss": "loss|{:.2%}",
    "best": "the sweep's best",
    "best_speed_up": "speed-up|{:.2f}×",
    "best_loss": "loss|{:.2%}",
    "falls_short": "pick falls short|{:.1%}",
}
# Settings between two runs of the plain model.
TURNS = 10


def all_settings(subject: ModelSubject) -> list[Candidate]:
    """Every setting that autotune may look at, each once."""
    first = usable(subject.target, subject.first())
    every = [*first, *(each for one in first for each in subject.variants(one))]
    return list({each.config.to_json(): each for each in usable(subject.target, every)}.values())


def sweep(subject: ModelSubject, every: list[Candidate], progress: Any = iter) -> list[Candidate]:
    """The settings, measured on all inputs."""
    measuring = Measuring(subject)
    measuring.turn(every, 0)  # what depends on sizes alone is made here
    for candidate in every:
        candidate.ratios.clear()
        candidate.seconds.clear()
    for index in progress(range(subject.num_inputs)):
        for start in range(0, len(every), TURNS):
            measuring.turn(every[start : start + TURNS], index, backwards=bool(index % 2))
    return every


def falls_short(pick: Candidate, best: Candidate, goal: Goal) -> float:
    """By which share of the best one's speed (or, at a given speed, of its agreement) the pick falls short of it."""
    if goal[0] == "max_loss":
        return 1 - pick.speed_up / best.speed_up
    return 1 - (1 - pick.loss) / (1 - best.loss)


def candidates_of(rows: list[dict[str, Any]]) -> list[Candidate]:
    """What a sweep of this module measured before, each setting by its label."""
    return [Candidate(None, row["label"], ratios=[row["speed_up"]], losses={0: row["loss"]}) for row in rows]  # type: ignore[arg-type]


def measure(
    subject: ModelSubject,
    goals: Sequence[Goal],
    rounds: int,
    swept: Callable[[list[Candidate]], list[Candidate]],
) -> dict[str, Any]:
    """{"rows": one a goal, "sweep": one a setting}. swept: from all settings to what a sweep measured of them."""
    picks = []
    for goal in goals:
        start = time.perf_counter()
        tuned = tune(subject, goal, rounds=rounds, progress=False)
        picks.append((goal, tuned, time.perf_counter() - start))
    settings = all_settings(subject)
    labels = {each.config.to_json(): each.label for each in settings}
    every = swept(settings)
    by_label = {each.label: each for each in every}
    rows = []
    for goal, tuned, seconds in picks:
        pick, best = by_label[labels[tuned.best.to_json()]], choose(every, goal).best
        rows.append(
            {
                "goal": f"{goal[0]} {goal[1]:g}",
                "seconds": seconds,
                "settings_tried": tuned.num_tried,
                "confident": tuned.confident,
                "note": tuned.note,
                "pick": pick.label,
                "pick_speed_up": pick.speed_up,
                "pick_loss": pick.loss,
                "best": best.label,
                "best_speed_up": best.speed_up,
                "best_loss": best.loss,
                "falls_short": falls_short(pick, best, goal),
            }
        )
    fields = ("label", "speed_up", "loss", "ideal")
    return {"rows": rows, "sweep": [{name: getattr(each, name) for name in fields} for each in every]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="CamVid's folder (default: camvid in AILURUS_DATA)")
    parser.add_argument("--model", default=str(SHIPPED), help="Segmenter folder or Hub name (default: the shipped one)")
    parser.add_argument("--limit", type=int, default=32, help="images (default: %(default)s)")
    parser.add_argument("--every", type=int, default=1, help="the sweep takes every so many (default: %(default)s)")
    parser.add_argument("--against", type=Path, metavar="FILE", help="a result file of this module, for its sweep")
    parser.add_argument("--max-loss", type=float, nargs="*", default=[0.02], help="goals (default: %(default)s)")
    parser.add_argument("--speedup", type=float, nargs="*", default=[2.5], help="goals (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="of autotune (default: %(default)s)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--name", default="autotune_sweep", help="of the result file (default: %(default)s)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = SegmenterForSemanticSegmentation.from_pretrained(args.model, dtype=torch.float32).eval().to(args.device)
    processor = SegmenterImageProcessor.from_pretrained(args.model)
    data = SegmentationData("camvid", args.data, limit=args.limit)
    images = [data.image(index) for index in range(len(data))]
    subject, few = (ModelSubject(model, chosen, processor) for chosen in (images, images[:: args.every]))
    goals: list[Goal] = [("max_loss", loss) for loss in args.max_loss]
    goals += [("speedup", speedup) for speedup in args.speedup]

    from tqdm import tqdm

    bar = functools.partial(tqdm, disable=None, unit="image")
    saved = json.loads(args.against.read_text()) if args.against else None
    found = measure(
        subject,
        goals,
        args.rounds,
        lambda settings: candidates_of(saved["sweep"]) if saved else sweep(few, settings, bar),
    )
    swept = saved["swept"] if saved else few.num_inputs
    about = {**environment(args.device, "fp32"), "dataset": "camvid", "images": len(data), "swept": swept}
    save(args.name, found["rows"], {**about, "sweep": found["sweep"]})
    print(markdown(found["rows"], COLUMNS))


if __name__ == "__main__":
    main()
