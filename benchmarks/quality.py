"""What the quality benchmarks share: score, agreement and speed of every method on one trained model.

Each method is on a copy of the model that shares its weights: where in memory weights lie moves a ratio by several
percent. Speeds are taken in turns after all scores.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .harness import interleaved, model_flops
from .methods import METHODS, Reduction, Setting, apply_method, parsed

# Method, L, keep ratio, restore_location.
Contender = tuple[str, int, float, int | None]


def reduced_copy(model: nn.Module, method: str, setting: Setting, inputs: list[Tensor]) -> tuple[nn.Module, Reduction]:
    """A copy of the model with the method on, and the handle on it; inputs: to match FLOPs on."""
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    return twin, apply_method(twin, method, setting, [lambda x=x: twin(x) for x in inputs])


def measure(
    model: nn.Module,
    samples: list[Tensor],
    inputs: Sequence[Tensor],
    forward: Callable[[nn.Module, Tensor], Any],
    predictions: Callable[[nn.Module], list[Tensor]],
    score: Callable[[list[Tensor]], float],
    score_name: str,
    contenders: dict[str, Contender],
    repeats: int,
) -> list[dict[str, Any]]:
    """One row a contender, after one for the plain model.

    samples: single images as the encoder sees them, to count FLOPs and to match them; inputs: what `forward` is timed on, in turn;
    predictions: labels of the whole data set, of which `score` makes the number that the rows hold as `score_name`.
    """
    full = model_flops(lambda: model(samples[0]))
    plain_labels = predictions(model)
    plain = score(plain_labels)
    reduced = {name: reduced_copy(model, m, Setting(*rest), samples) for name, (m, *rest) in contenders.items()}
    first = {"method": "plain", score_name: plain, "agreement": 1.0, "gflops": full / 1e9}
    rows: list[dict[str, Any]] = [first]
    for name, (twin, reduction) in tqdm(reduced.items(), desc="quality"):
        labels = predictions(twin)
        same = [(a == b).float().mean().item() for a, b in zip(labels, plain_labels, strict=True)]
        method, location, keep, restore_location = contenders[name]
        value = score(labels)
        flops = reduction.flops(full, lambda twin=twin: twin(samples[0]))
        rows.append(
            {
                "method": method,
                "location": location,
                "keep_ratio": keep,
                "restore_location": restore_location,
                "settings": reduction.settings,
                "num_clusters": reduction.num_clusters(),
                score_name: value,
                "lost": plain - value,
                "agreement": sum(same) / len(same),
                "gflops": flops / 1e9,
                "ideal": full / flops,
            }
        )
    models = {"plain": model, **{name: twin for name, (twin, _) in reduced.items()}}
    runs = {name: (lambda n, m=m: forward(m, inputs[n % len(inputs)])) for name, m in models.items()}
    with torch.inference_mode():
        seconds = interleaved(runs, repeats, warmup=3, device=samples[0].device)
    for row, name in zip(rows, models, strict=True):
        row["ms"] = 1e3 * seconds[name]
        row["speed_up"] = seconds["plain"] / seconds[name]
        row["share_of_ideal"] = row["speed_up"] / row.get("ideal", 1.0)
    return rows


def add_arguments(parser: argparse.ArgumentParser, keep: list[float], locations: list[int], name: str) -> None:
    """The options of every quality benchmark, with its own defaults."""
    parser.add_argument("--data", help="the data set's folder (default: the one of its name in AILURUS_DATA)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help=", ".join(METHODS))
    parser.add_argument("--keep", nargs="+", type=float, default=keep)
    parser.add_argument("--locations", nargs="+", type=int, default=locations)
    parser.add_argument("--restore-locations", nargs="+", type=int, default=[], help="also these, with residual")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--limit", type=int, help="only so many images")
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--name", default=name, help="of the result file")


def chosen_contenders(args: argparse.Namespace) -> dict[str, Contender]:
    """Every combination of the options."""
    contenders: dict[str, Contender] = {}
    for location, keep, method in itertools.product(args.locations, args.keep, args.methods):
        places = [None] + (args.restore_locations if METHODS[parsed(method)[0]].takes_restore_location else [])
        for restore_location in places:
            key = f"{method}, L={location}, keep={keep}, R={restore_location}"
            contenders[key] = (method, location, keep, restore_location)
    return contenders
