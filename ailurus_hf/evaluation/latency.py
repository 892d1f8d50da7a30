"""Where the time of a reduced forward goes: clustering, merging, attention, MLP, unmerging, and the rest (table 13).

The parts are named ranges of torch's profiler: "ailurus::cluster", "ailurus::merge" and "ailurus::unmerge" are in the
library itself, "ailurus::attention" and "ailurus::mlp" are put around the layers' modules while it is measured.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from ..hooks import Hooks
from ..vision.discovery import find_encoders
from .timing import wait_for

PARTS = ("cluster", "merge", "attention", "mlp", "unmerge")
PREFIX = "ailurus::"


class Span(NamedTuple):
    """A range of a profile, in microseconds."""

    part: str
    start: float
    end: float


@torch.no_grad()
def latency_split(
    model: nn.Module,
    run: Callable[[], Any],
    repeats: int = 5,
    warmup: int = 1,
    timed: Sequence[tuple[Any, str, str]] = (),
) -> dict[str, float]:
    """Median milliseconds of a forward by part.

    Args:
        model: one with a ViT encoder, with AiluRus on or off.
        run: a forward of it.
        repeats, warmup: forwards that count, and forwards before them that do not.
        timed: more to count, as (object, name of its function, part): what another method does beside AiluRus.

    Returns:
        Those of PARTS and of `timed`, "rest" (embeddings, norms, heads, adding to what restore="residual" kept) and
        "total". A part inside another counts for itself alone. On a GPU the times are the device's. The profiler costs
        a little, so that "total" is no measure of speed.
    """
    parts = dict.fromkeys((*PARTS, "rest", *(part for _, _, part in timed)))
    taken: dict[str, list[float]] = defaultdict(list)
    device = next(model.parameters()).device
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with _named(model, timed):
        for turn in range(warmup + repeats):
            with profile(activities=activities) as profiler:
                with record_function(f"{PREFIX}rest"):
                    run()
                wait_for(device)
            if turn >= warmup:
                found = exclusive_times(_spans(profiler, on_device=device.type == "cuda"))
                for part in parts:
                    taken[part].append(found.get(part, 0.0) / 1e3)
                taken["total"].append(sum(found.values()) / 1e3)
    return {part: statistics.median(values) for part, values in taken.items()}


def exclusive_times(spans: Iterable[Span]) -> dict[str, float]:
    """The time of each part, without what lies in another span inside it."""
    times: dict[str, float] = defaultdict(float)
    around: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        while around and around[-1].end <= span.start:
            around.pop()
        length = span.end - span.start
        times[span.part] += length
        if around:
            times[around[-1].part] -= length
        around.append(span)
    return dict(times)


def _spans(profiler: profile, on_device: bool) -> list[Span]:
    wanted = torch.autograd.DeviceType.CUDA if on_device else torch.autograd.DeviceType.CPU
    return [
        Span(event.name.removeprefix(PREFIX), event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.name.startswith(PREFIX) and event.device_type == wanted
    ]


@contextmanager
def _named(model: nn.Module, timed: Sequence[tuple[Any, str, str]]) -> Iterator[None]:
    """Puts names around the layers' attention and MLP, and around the functions to be timed."""
    hooks = Hooks()
    opened: list[record_function] = []

    def enter(part: str, *_: Any) -> None:
        opened.append(record_function(f"{PREFIX}{part}"))
        opened[-1].__enter__()

    def leave(*_: Any) -> None:
        opened.pop().__exit__(None, None, None)

    with ExitStack() as stack:
        stack.callback(hooks.remove)
        for found in find_encoders(model):
            for layer in (*found.layers, *found.decoder_layers):
                for name, child in layer.named_children():
                    if name == "mlp" or any(path.endswith("q_proj") for path, _ in child.named_modules()):
                        hooks.pre_forward(child, partial(enter, "mlp" if name == "mlp" else "attention"))
                        hooks.post_forward(child, leave, prepend=True)
        for owner, name, part in timed:
            stack.enter_context(_replaced(owner, name, _recorded(getattr(owner, name), part)))
        yield


def _recorded(function: Callable, part: str) -> Callable:
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(f"{PREFIX}{part}"):
            return function(*args, **kwargs)

    return run


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
