"""What the quality benchmarks share: score, agreement and speed of every method on one trained model.

Each method is on a copy of the model that shares its weights: where in memory weights lie moves a ratio by several
percent. Speeds are taken in turns after all scores. Where a batch is one image, scores and their differences can have
intervals over images.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..harness import interleaved, model_flops
from ..harness.bootstrap import called, drawn_weights, interval, resampled_scores
from ..methods import EVERY, METHODS, Amount, AppliedMethod, apply_method, parsed

# Method, L, keep ratio, restore_location.
Contender = tuple[str, int, float, int | None]


def reduced_copy(
    model: nn.Module, method: str, amount: Amount, inputs: list[Tensor]
) -> tuple[nn.Module, AppliedMethod]:
    """A copy of the model with the method on, and the handle on it; inputs: to match FLOPs on."""
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    return twin, apply_method(twin, method, amount, [lambda x=x: twin(x) for x in inputs])


@dataclass(frozen=True)
class Scored:
    """What a model is for, and on what it is measured.

    samples: single images as the encoder sees them, to count FLOPs and to match them. timed: what `forward` is timed
    on, in turn. batches: every batch of the data set as the model takes it, with its true labels; read once. labels:
    the model's, Tensor[B, ...]. counts: of one batch; the sum over all is what `score` makes a number of,
    which the rows hold as `score_name`.
    """

    score_name: str
    samples: list[Tensor]
    timed: Sequence[Tensor]
    forward: Callable[[nn.Module, Tensor], Any]
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    labels: Callable[[nn.Module, Tensor, Tensor], Tensor]
    counts: Callable[[Tensor, Tensor], np.ndarray]
    score: Callable[[np.ndarray], float]
    num_batches: int
    batch_size: int = 1


@torch.inference_mode()
def counted(task: Scored, models: dict[str, nn.Module], of_each: bool) -> dict[str, tuple[np.ndarray, float]]:
    """Counts of every batch (of_each) or one sum of them, and share of labels equal to the first model's, of each
    model: all see a batch before the next one is read."""
    counts: dict[str, list[np.ndarray]] = {name: [] for name in models}
    same: dict[str, list[float]] = {name: [] for name in models}
    for inputs, truth in tqdm(task.batches(), desc="quality", total=task.num_batches):
        plain: Tensor | None = None
        for name, model in models.items():
            labels = task.labels(model, inputs, truth)
            plain = labels if plain is None else plain
            same[name] += (labels == plain).float().view(len(labels), -1).mean(1).tolist()
            counts[name].append(task.counts(labels, truth))
            counts[name] = counts[name] if of_each else [np.sum(counts[name], axis=0)]
    return {name: (np.stack(counts[name]), statistics.fmean(same[name])) for name in models}


@dataclass(frozen=True)
class Resampling:
    """Intervals over images. against: a method that the others are compared with at the same L and keep ratio."""

    generator: np.random.Generator
    num_resamples: int = 2000
    against: str | None = None


def intervals(
    task: Scored, counts: dict[str, np.ndarray], contenders: dict[str, Contender], resampling: Resampling
) -> dict[str, dict[str, Any]]:
    """What rows say of chance, by name: the score's interval, and those of differences on the same resamples."""
    first = next(iter(counts.values()))
    weights = drawn_weights(len(first), resampling.num_resamples, resampling.generator)
    values = {name: resampled_scores(each, weights, task.score) for name, each in counts.items()}
    scores = {name: task.score(each.sum(0)) for name, each in counts.items()}
    return chances(scores, values, contenders, resampling.against)


def chances(
    scores: dict[str, float], values: dict[str, np.ndarray], contenders: dict[str, Contender], against: str | None
) -> dict[str, dict[str, Any]]:
    """The same from each model's score, and its scores of the resamples, which are the same images for all models."""
    found: dict[str, dict[str, Any]] = {name: {"score_between": interval(values[name])} for name in scores}
    for name, (method, *amount) in contenders.items():
        lost = interval(values["plain"] - values[name])
        found[name] |= {"lost_between": lost, "lost_is": called(lost, "a loss", "a gain")}
        for other, (reference, *of_other) in contenders.items():
            if reference == against != method and of_other[:2] == amount[:2] and of_other[2] is None:
                behind = interval(values[other] - values[name])
                found[name] |= {
                    "reference": reference,
                    "behind": scores[other] - scores[name],
                    "behind_between": behind,
                    "behind_is": called(behind, "behind", "ahead"),
                }
    return found


def scored(
    model: nn.Module, task: Scored, contenders: dict[str, Contender], resampling: Resampling | None = None
) -> tuple[list[dict[str, Any]], dict[str, nn.Module]]:
    """One row a contender, after one for the plain model, and the models; nothing is timed."""
    full = model_flops(lambda: model(task.samples[0]))
    reduced = {name: reduced_copy(model, m, Amount(*rest), task.samples) for name, (m, *rest) in contenders.items()}
    models = {"plain": model, **{name: twin for name, (twin, _) in reduced.items()}}
    found = counted(task, models, of_each=resampling is not None)
    chance: dict[str, dict[str, Any]] = {name: {} for name in models}
    if resampling is not None:
        chance = intervals(task, {name: counts for name, (counts, _) in found.items()}, contenders, resampling)
    values = {name: round(task.score(counts.sum(0)), 2) for name, (counts, _) in found.items()}
    plain = values["plain"]
    first = {"method": "plain", task.score_name: plain, "agreement": 1.0, "gflops": full / 1e9}
    rows: list[dict[str, Any]] = [{**first, **chance["plain"]}]
    for name, (twin, reduction) in reduced.items():
        method, location, keep, restore_location = contenders[name]
        flops = reduction.flops(full, lambda twin=twin: twin(task.samples[0]))
        rows.append(
            {
                "method": method,
                "location": location,
                "keep_ratio": keep,
                "restore_location": restore_location,
                "settings": reduction.settings,
                "num_clusters": reduction.num_clusters(),
                task.score_name: values[name],
                "lost": plain - values[name],
                "agreement": found[name][1],
                "gflops": flops / 1e9,
                "ideal": full / flops,
                **chance[name],
            }
        )
    return rows, models


def measure(
    model: nn.Module,
    task: Scored,
    contenders: dict[str, Contender],
    repeats: int,
    resampling: Resampling | None = None,
) -> list[dict[str, Any]]:
    """Those rows with speeds, unless there are no repeats."""
    rows, models = scored(model, task, contenders, resampling)
    if not repeats:
        return rows
    runs = {name: (lambda n, m=m: task.forward(m, task.timed[n % len(task.timed)])) for name, m in models.items()}
    with torch.inference_mode():
        seconds = interleaved(runs, repeats, warmup=3, device=task.samples[0].device)
    for row, name in zip(rows, models, strict=True):
        row["ms"] = 1e3 * seconds[name]
        row["images_per_second"] = task.batch_size / seconds[name]
        row["speed_up"] = seconds["plain"] / seconds[name]
        row["share_of_ideal"] = row["speed_up"] / row.get("ideal", 1.0)
    return rows


def add_arguments(parser: argparse.ArgumentParser, keep: list[float], locations: list[int], name: str) -> None:
    """The options of every quality benchmark, with its own defaults."""
    parser.add_argument("--data", help="the data set's folder (default: the one of its name in AILURUS_DATA)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help=", ".join(METHODS))
    parser.add_argument("--keep", nargs="+", type=float, default=keep)
    parser.add_argument("--locations", nargs="+", type=int, default=locations)
    parser.add_argument("--restore-locations", nargs="+", type=int, default=[], help="also these, for our own methods")
    parser.add_argument("--repeats", type=int, default=15, help="of each timing (0: scores alone)")
    parser.add_argument("--limit", type=int, help="only so many images, evenly from the whole split")
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--name", default=name, help="of the result file")


def chosen_contenders(args: argparse.Namespace) -> dict[str, Contender]:
    """Every combination of the options."""
    contenders: dict[str, Contender] = {}
    for location, keep, method in itertools.product(args.locations, args.keep, args.methods):
        locations = [None] + (args.restore_locations if EVERY[parsed(method)[0]].takes_restore_location else [])
        for restore_location in locations:
            key = f"{method}, L={location}, keep={keep}, R={restore_location}"
            contenders[key] = (method, location, keep, restore_location)
    return contenders
