"""Timing rounds: the plain model and its contenders take turns in one process, each switched on for its turn alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ailurus_hf import AiluRusConfig, ailurus_enabled, ailurus_status
from ailurus_hf.evaluation.timing import interleaved

from .counting import model_flops, peak_bytes


@contextmanager
def switched(on: Callable[[], Callable[[], Any]]) -> Iterator[None]:
    """For a `with` block what `on` switches on; it returns the call that switches it off."""
    off = on()
    try:
        yield
    finally:
        off()


def reductions_in_turn(
    model: nn.Module,
    run: Callable[[Tensor], Sequence[Tensor]],
    images: Tensor,
    configs: Sequence[AiluRusConfig],
    repeats: int,
) -> list[dict[str, Any]]:
    """A row a config: one model, on which each config is on for its turn alone, and what the FLOPs allow.

    run: from one of `images`, Tensor[B, 3, H, W], to what is compared with the plain model's by cosine. The device is
    that of the images.
    """
    full, before = model_flops(lambda: run(images[0])), run(images[0])
    rows: list[dict[str, Any]] = []
    for config in configs:
        with ailurus_enabled(model, config):
            after, status = run(images[0]), ailurus_status(model)
        pairs = zip(before, after, strict=True)
        cosines = [F.cosine_similarity(a.flatten(1).float(), b.flatten(1).float()) for a, b in pairs]
        rows.append(
            {
                "tokens": ", ".join(
                    f"{location.num_tokens} → {location.num_clusters}" for location in status.locations
                ),
                "ideal": full / (full - images.shape[1] * status.saved_flops),
                "cosine": torch.stack(cosines).mean().item(),
            }
        )
    contenders: list[AiluRusConfig | None] = [None, *configs]
    seconds = interleaved(
        {number: lambda n: run(images[n % len(images)]) for number in range(len(contenders))},
        repeats,
        device=images.device,
        around=lambda number: ailurus_enabled(model, contenders[number]),
    )
    for number, row in enumerate(rows, start=1):
        row["plain_ms"], row["reduced_ms"] = 1e3 * seconds[0], 1e3 * seconds[number]
        row["speed_up"] = row["plain_ms"] / row["reduced_ms"]
        row["share_of_ideal"] = row["speed_up"] / row["ideal"]
    return rows


def methods_in_turn(
    target: Any,
    methods: Mapping[str, Callable[[], Callable[[], Any]]],
    step: Callable[[int], Tensor],
    full: float,
    repeats: int,
    device: torch.device,
    *,
    images: int = 1,
    timed: Callable[[int], Any] | None = None,
    beside: Callable[[], Callable[[], Any]] | None = None,
    whole: bool = False,
) -> dict[str, dict[str, Any]]:
    """A row a method, each on for its turn alone: seconds, speed-up, memory, cosine, and for ours what the FLOPs allow.

    target: the network or pipeline that AiluRus is applied to, for its status.
    methods: what switches each on, and returns the call that switches it off; the first is the plain one.
    step: the prediction for inputs of a number. full: its FLOPs, of so many `images`, when plain.
    timed: what is timed, if not `step`.
    beside: while ours is on, makes the call that does again what ours does beside the network; timed as well.
    whole: what is timed are whole generations, which need no warm-up of their own.
    """
    rows: dict[str, dict[str, Any]] = {}
    works: dict[str, Callable[[], Any]] = {}
    plain: Tensor | None = None
    for name, on in methods.items():
        with switched(on):
            outputs: list[Tensor] = []
            if not whole:
                # The first run also makes what depends on sizes alone, which would count as memory of the step.
                step(0)
            peak = peak_bytes(lambda outputs=outputs: outputs.append(step(0)), device)
            output = outputs[0].float().flatten(1)
            plain = output if plain is None else plain
            row: dict[str, Any] = {"method": name, "peak_mib": None if peak is None else peak / 2**20}
            if (status := ailurus_status(target)).active:
                row["ideal"] = full / (full - images * status.saved_flops)
                if beside is not None:
                    works[name] = beside()
        rows[name] = {**row, "cosine": F.cosine_similarity(output, plain).mean().item()}
    contenders: dict[tuple[str, str], Callable[[int], Any]] = {(name, ""): timed or step for name in methods}
    contenders |= {(name, "beside"): (lambda _, work=work: work()) for name, work in works.items()}
    seconds = interleaved(
        contenders,
        repeats,
        warmup=0 if whole else 1,
        device=device,
        around=lambda key: nullcontext() if key[1] else switched(methods[key[0]]),
    )
    first = seconds[next(iter(methods)), ""]
    for name, row in rows.items():
        row["seconds"] = seconds[name, ""]
        row["speed_up"] = first / row["seconds"]
        if "ideal" in row:
            row["share_of_ideal"] = row["speed_up"] / row["ideal"]
        if name in works:
            row["steps_ms"] = 1e3 * seconds[name, "beside"]
            row["overhead"] = seconds[name, "beside"] / row["seconds"]
    return rows
