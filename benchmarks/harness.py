"""What every benchmark needs beside `ailurus_hf.evaluation.timing`: FLOPs, memory, and results that say what made them."""

from __future__ import annotations

import gc
import json
import logging
import shlex
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ailurus_hf import AiluRusConfig, ailurus_enabled, ailurus_status
from ailurus_hf.evaluation.timing import interleaved, markdown, measured_on, wait_for

__all__ = [
    "RESULTS",
    "environment",
    "interleaved",
    "log",
    "markdown",
    "measured_columns",
    "methods_in_turn",
    "model_flops",
    "peak_bytes",
    "peak_on_shapes",
    "reductions_in_turn",
    "save",
    "switched",
]

RESULTS = Path(__file__).parent / "results"
log = logging.getLogger("benchmarks")


def model_flops(run: Callable[[], Any]) -> int:
    """FLOPs of a call, counted by torch, whose counter does not know the CPU's fused attention."""
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    with FlopCounterMode(display=False, custom_mapping=fused) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def _attention_flops(query: Any, key: Any, value: Any, *others: Any, **named: Any) -> int:
    return sdpa_flop_count(query, key, value)


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Memory that a call needs at most beyond what was held before; on a CPU by Linux's own count, elsewhere None."""
    if device.type == "cuda":
        wait_for(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        wait_for(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        # Sets the peak back to what is resident now.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = high_water_mark()
    run()
    return high_water_mark() - before


def high_water_mark() -> int:
    """Peak resident bytes of this process so far (Linux). getrusage would count the parent's from before the exec."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


class StorageWatch(TorchDispatchMode):
    """Bytes of the tensors that are made inside and still alive (`now`), and the most that there were at once (`most`)."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if (
                isinstance(tensor, torch.Tensor)
                and (key := (storage := tensor.untyped_storage())._cdata) not in self.sizes
            ):
                self.sizes[key] = storage.nbytes()
                self.now += self.sizes[key]
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, key)
        return out

    def _freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


class FusedAttention(TorchFunctionMode):
    """Attention as kernels do it that hold no scores; for shapes alone, where torch would take it apart."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is F.scaled_dot_product_attention:
            return args[0].new_empty(*args[0].shape[:-1], args[2].shape[-1])
        return function(*args, **(kwargs or {}))


def peak_on_shapes(run: Callable[[], Any]) -> int:
    """Bytes that a call on meta tensors would need at most beyond what was held before, were its attention fused.

    An estimate: workspaces of convolutions and what an allocator cannot use again come on top.
    """
    gc.collect()
    with torch.no_grad(), FusedAttention(), StorageWatch() as watch:
        run()
    return watch.most


def measured_columns(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Rows under the headings of the benchmark that made them, where anything was measured."""
    return markdown(rows, {key: head for key, head in columns.items() if any(row.get(key) is not None for row in rows)})


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

    run: from one of `images`, Tensor[B, 3, H, W], to what is compared with the plain model's by cosine.
    """
    full, before = model_flops(lambda: run(images[0])), run(images[0])
    rows: list[dict[str, Any]] = []
    for config in configs:
        with ailurus_enabled(model, config):
            after, status = run(images[0]), ailurus_status(model)
        cosines = [F.cosine_similarity(a.flatten(1), b.flatten(1)) for a, b in zip(before, after, strict=True)]
        rows.append(
            {
                "tokens": ", ".join(
                    f"{location.num_tokens} → {location.num_clusters}" for location in status.locations
                ),
                "ideal": full / (full - status.saved_flops),
                "cosine": torch.stack(cosines).mean().item(),
            }
        )
    contenders: list[AiluRusConfig | None] = [None, *configs]
    seconds = interleaved(
        {number: lambda n: run(images[n % len(images)]) for number in range(len(contenders))},
        repeats,
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
) -> dict[str, dict[str, Any]]:
    """A row a method, each on for its turn alone: seconds, speed-up, memory, cosine, and for ours what the FLOPs allow.

    target: the network or pipeline that AiluRus is applied to, for its status.
    methods: what switches each on, and returns the call that switches it off; the first is the plain one.
    step: the prediction for inputs of a number. full: its FLOPs, of so many `images`, when plain.
    timed: what is timed, if not `step`.
    beside: while ours is on, makes the call that does again what ours does beside the network; timed as well.
    """
    rows: dict[str, dict[str, Any]] = {}
    works: dict[str, Callable[[], Any]] = {}
    plain: Tensor | None = None
    for name, on in methods.items():
        with switched(on):
            # The first run also makes what depends on sizes alone, which would count as memory of the step.
            output = step(0).float().flatten(1)
            plain = output if plain is None else plain
            peak = peak_bytes(lambda: step(0), device)
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
        warmup=1,
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


def environment(device: torch.device, precision: str) -> dict[str, Any]:
    """What a result file says of where its numbers come from."""
    command = f"python -m benchmarks.{Path(sys.argv[0]).stem} {shlex.join(map(_without_folder, sys.argv[1:]))}".strip()
    return {**measured_on(device, precision), "command": command}


def _without_folder(argument: str) -> str:
    return Path(argument).name if Path(argument).is_absolute() else argument


def save(name: str, rows: Sequence[dict[str, Any]], about: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Writes rows and environment as results/NAME-DEVICE-PRECISION.json; returns the path."""
    kind = "cuda" if "NVIDIA" in about["device"] else "cpu"
    path = folder / f"{name}-{kind}-{about['precision']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "rows": list(rows)}, indent=1) + "\n")
    log.info("wrote %s", path)
    return path
