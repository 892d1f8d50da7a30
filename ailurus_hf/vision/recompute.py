"""What layers need when a checkpoint around them runs them again in the backward pass, after the forward is over."""

from __future__ import annotations

import weakref
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class _Kept(Generic[T]):
    def __init__(self, value: T) -> None:
        self.value = value


class Recompute(Generic[T]):
    """Values by the tensor that a layer was given; each lives as long as its tensor, which the checkpoint holds.

    A checkpoint hands a layer the same tensor again, or (reentrant ones) another over the same memory. Copies and
    pickles are empty.
    """

    def __init__(self) -> None:
        self._kept: weakref.WeakValueDictionary[tuple[Any, ...], _Kept[T]] = weakref.WeakValueDictionary()
        self._attribute = f"_ailurus_recompute_{id(self)}"

    def keep(self, tensor: Tensor, value: T) -> None:
        """Keeps a value for a tensor. The value must not refer to the tensor itself, or neither is ever freed."""
        if (key := _key(tensor)) is not None:
            kept = _Kept(value)
            setattr(tensor, self._attribute, kept)
            self._kept[key] = kept

    def find(self, tensor: Tensor) -> T | None:
        """The value that was kept for this tensor, if it is still there."""
        if torch.compiler.is_compiling() or (key := _key(tensor)) is None:
            return None
        kept = self._kept.get(key)
        return None if kept is None else kept.value

    def is_kept_on(self, tensor: Tensor) -> bool:
        """Whether this very tensor was given before, and not another over its memory, as by a reentrant checkpoint."""
        return hasattr(tensor, self._attribute)

    def __deepcopy__(self, memo: dict[int, Any]) -> Recompute[T]:
        return Recompute()

    def __reduce__(self) -> tuple[type[Recompute[T]], tuple[()]]:
        return Recompute, ()


def may_run_again(tensor: Tensor) -> bool:
    """Whether a checkpoint around a layer that is given this tensor might run it again in a backward pass."""
    return not torch.compiler.is_compiling() and (torch.is_grad_enabled() or tensor.requires_grad)


def _key(tensor: Tensor) -> tuple[Any, ...] | None:
    try:
        return tensor.data_ptr(), tensor.device, tuple(tensor.shape)
    except RuntimeError:  # tensors without memory of their own, as in torch.func and while exporting
        return None
