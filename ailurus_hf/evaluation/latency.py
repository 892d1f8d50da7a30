"""Where the time of a reduced forward goes: clustering, merging, attention, MLP, unmerging, and the rest (table 13)."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import nn

from ..clusters import TokenClusters
from ..hooks import Hooks
from ..vision.apply import reducers_of
from ..vision.discovery import find_encoders
from .timing import wait_for

PARTS = ("cluster", "merge", "attention", "mlp", "unmerge")


class Stopwatch:
    """Time by part. A part inside another counts for itself alone; on a GPU every part is waited for at both ends."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[tuple[str, float]] = []

    def start(self, part: str) -> None:
        now = self._now()
        if self._open:
            outer, since = self._open[-1]
            self.seconds[outer] += now - since
        self._open.append((part, now))

    def stop(self) -> None:
        now = self._now()
        part, since = self._open.pop()
        self.seconds[part] += now - since
        if self._open:
            self._open[-1] = (self._open[-1][0], now)

    def timed(self, part: str, function: Callable) -> Callable:
        """The function, its calls counted for a part."""

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.start(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.stop()

        return run

    def _now(self) -> float:
        wait_for(self.device)
        return time.perf_counter()


@torch.no_grad()
def latency_split(
    model: nn.Module,
    run: Callable[[], Any],
    repeats: int = 5,
    warmup: int = 1,
    timed: Sequence[tuple[Any, str, str]] = (),
) -> dict[str, float]:
    """Median milliseconds of a forward by part: those of PARTS, "rest" and "total".

    model: one with a ViT encoder, with AiluRus on or off; run: a call of it. "unmerge" gives values back to N places; adding them to
        what restore="residual" kept is in "rest", as are embeddings, norms and heads. Waiting for every part costs a little, so "total" is
        no measure of speed.
    timed: more to count, as (object, name of its function, part): what another method does beside AiluRus.
    """
    parts = dict.fromkeys((*PARTS, "rest", *(part for _, _, part in timed)))
    taken: dict[str, list[float]] = defaultdict(list)
    for turn in range(warmup + repeats):
        watch = Stopwatch(next(model.parameters()).device)
        with _watched(model, watch, timed):
            watch.timed("rest", run)()
        if turn >= warmup:
            for part in parts:
                taken[part].append(1e3 * watch.seconds[part])
            taken["total"].append(1e3 * sum(watch.seconds.values()))
    return {part: statistics.median(values) for part, values in taken.items()}


@contextmanager
def _watched(model: nn.Module, watch: Stopwatch, timed: Sequence[tuple[Any, str, str]]) -> Iterator[None]:
    hooks = Hooks()
    with ExitStack() as stack:
        stack.callback(hooks.remove)
        for found in find_encoders(model):
            for layer in (*found.layers, *found.decoder_layers):
                for name, child in layer.named_children():
                    if name == "mlp" or any(path.endswith("q_proj") for path, _ in child.named_modules()):
                        part = "mlp" if name == "mlp" else "attention"
                        hooks.pre_forward(child, lambda *_, part=part: watch.start(part))
                        hooks.post_forward(child, lambda *_: watch.stop(), prepend=True)
        for reducer in reducers_of(model):
            for name in {"clustering", "nesting"} & vars(reducer).keys():
                timer = partial(_timed_clustering, watch, getattr(reducer, name))
                stack.enter_context(_replaced(reducer, name, timer))
        for owner, name, part in timed:
            stack.enter_context(_replaced(owner, name, watch.timed(part, getattr(owner, name))))
        yield


def _timed_clustering(watch: Stopwatch, clustering: Callable[..., TokenClusters], *args: Any) -> TokenClusters:
    clusters = watch.timed("cluster", clustering)(*args)
    vars(clusters)["merge"] = watch.timed("merge", clusters.merge)
    vars(clusters)["unmerge"] = watch.timed("unmerge", clusters.unmerge)
    return clusters


@contextmanager
def _replaced(owner: Any, name: str, function: Callable) -> Iterator[None]:
    own = name in vars(owner)
    previous = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, previous)
        else:
            delattr(owner, name)
