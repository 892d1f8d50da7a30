"""What the quality benchmarks share: score, agreement and speed of every method on one trained model.

Each method is on a copy of the model that shares its weights: where in memory weights lie moves a ratio by several
percent. Speeds are taken in turns after all scores.
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
def scores(task: Scored, models: dict[str, nn.Module]) -> dict[str, tuple[float, float]]:
    """Score, and share of labels equal to the first model's, of each: all see a batch before the next one is read."""
    counts: dict[str, Any] = dict.fromkeys(models, 0)
    same: dict[str, list[float]] = {name: [] for name in models}
    for inputs, truth in tqdm(task.batches(), desc="quality", total=task.num_batches):
        plain: Tensor | None = None
        for name, model in models.items():
            labels = task.labels(model, inputs, truth)
            plain = labels if plain is None else plain
            same[name] += (labels == plain).float().view(len(labels), -1).mean(1).tolist()
            counts[name] = counts[name] + task.counts(labels, truth)
    return {name: (task.score(counts[name]), statistics.fmean(same[name])) for name in models}


def scored(
    model: nn.Module, task: Scored, contenders: dict[str, Contender]
) -> tuple[list[dict[str, Any]], dict[str, nn.Module]]:
    """One row a contender, after one for the plain model, and the models; nothing is timed."""
    full = model_flops(lambda: model(task.samples[0]))
    reduced = {name: reduced_copy(model, m, Amount(*rest), task.samples) for name, (m, *rest) in contenders.items()}
    models = {"plain": model, **{name: twin for name, (twin, _) in reduced.items()}}
    found = scores(task, models)
    plain, _ = found["plain"]
    rows: list[dict[str, Any]] = [{"method": "plain", task.score_name: plain, "agreement": 1.0, "gflops": full / 1e9}]
    for name, (twin, reduction) in reduced.items():
        value, agreement = found[name]
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
                task.score_name: value,
                "lost": plain - value,
                "agreement": agreement,
                "gflops": flops / 1e9,
                "ideal": full / flops,
            }
        )
    return rows, models


def measure(model: nn.Module, task: Scored, contenders: dict[str, Contender], repeats: int) -> list[dict[str, Any]]:
    """Those rows with speeds."""
    rows, models = scored(model, task, contenders)
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
    parser.add_argument("--repeats", type=int, default=15)
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
