"""FLOPs, launches and peak memory of one call: counted by torch, measured by the system, or estimated from shapes."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ailurus_hf.evaluation.timing import wait_for


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
    gc.collect()
    # What was freed before may still be resident, and a call that took it from there would seem to need nothing.
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
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


class Launches(TorchDispatchMode):
    """Counts the operators inside that launch a kernel on a GPU, by name: all but views and what only allocates."""

    FREE = frozenset(
        ("detach", "alias", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
    )

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        returned = [out.alias_info for out in function._schema.returns]
        is_view = bool(returned) and all(alias is not None and not alias.is_write for alias in returned)
        name = function._schema.name.split("::")[1]
        # What inference mode shows whole and does nothing then.
        if not is_view and name not in self.FREE and name not in ("dropout", "_unsafe_view"):
            self.by_name[name] += 1
        return function(*args, **(kwargs or {}))


def launches(run: Callable[[], Any]) -> Counter[str]:
    """The launches of a call's second run, by operator, attention left out: tables of a grid are made in the first."""
    with torch.no_grad(), FusedAttention():
        run()
        with Launches() as counted:
            run()
    return counted.by_name


class StorageWatch(TorchDispatchMode):
    """Bytes of the tensors made inside that are alive (`now`), and the most that were alive at once (`most`)."""

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
