"""Hooks: what a reduction put on a model, so that it can be taken off again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Hooks:
    """Hooks on modules and other changes. `remove` undoes all of them, the last one first."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def pre_forward(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """hook(module, args, kwargs) -> None, or the (args, kwargs) to call the module with."""
        self._undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def post_forward(
        self, module: nn.Module, hook: Callable[..., Any], *, prepend: bool = False, with_kwargs: bool = False
    ) -> None:
        """hook(module, args, output) -> None, or another output; with_kwargs: hook(module, args, kwargs, output).

        prepend: before the hooks that are there already, so that they see the other output.
        """
        handle = module.register_forward_hook(hook, prepend=prepend, with_kwargs=with_kwargs)
        self._undo.append(handle.remove)

    def on_removal(self, undo: Callable[[], object]) -> None:
        """Has `remove` call this too."""
        self._undo.append(undo)

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()
