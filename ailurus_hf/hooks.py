"""Hooks: what a reduction put on a model, so that it can be taken off again, from the model and from copies of it
alike.

All that undoes a change is a bound method of an object that holds the module it was done to, and no closure: a deep
copy or a pickle of the model then undoes what was done to the copy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn


class Hooks:
    """Hooks on modules and other changes. `remove` undoes all of them, the last one first."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def pre_forward(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """hook(module, args, kwargs) -> None, or the (args, kwargs) to call the module with."""
        let_compiler_see_hooks()
        self._undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def post_forward(
        self,
        module: nn.Module,
        hook: Callable[..., Any],
        *,
        prepend: bool = False,
        with_kwargs: bool = False,
        always_call: bool = False,
    ) -> None:
        """hook(module, args, output) -> None, or another output.

        Args:
            module: whose forward it follows.
            hook: the call; with `with_kwargs` it is hook(module, args, kwargs, output).
            prepend: before the hooks that are there already, so that they see the other output.
            with_kwargs: hand on the keyword arguments, too.
            always_call: also where the forward raises; the output is then None.
        """
        let_compiler_see_hooks()
        handle = module.register_forward_hook(hook, prepend=prepend, with_kwargs=with_kwargs, always_call=always_call)
        if prepend:
            _write_in_order(module._forward_hooks)
        self._undo.append(handle.remove)

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute; undoing it leaves what another call has set there since."""
        change = _ReplacedAttribute(owner, name, value)
        change.install()
        self._undo.append(change.undo)

    def replace_method(self, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        """Has module.name(*args, **kwargs) call function(original, *args, **kwargs).

        Wrappers that other libraries put around a `forward`, before or after, stay where they are.
        """
        let_compiler_see_hooks()
        change = _ReplacedMethod(module, name, function)
        change.install()
        self._undo.append(change.undo)

    def on_removal(self, undo: Callable[[], object]) -> None:
        """Has `remove` call this too: a bound method or a partial, and no closure, which copies would share."""
        self._undo.append(undo)

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()


class _ReplacedAttribute:
    """An attribute in an object's own dict, and what was there before."""

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self.owner, self.name, self.value = owner, name, value
        self.was_set = name in vars(owner)
        self.before = vars(owner).get(name)

    def install(self) -> None:
        vars(self.owner)[self.name] = self.value

    def undo(self) -> None:
        if vars(self.owner).get(self.name) is not self.value:
            return
        if self.was_set:
            vars(self.owner)[self.name] = self.before
        else:
            del vars(self.owner)[self.name]


class _ReplacedMethod:
    """A method in a module's own dict. Once undone it passes calls on, for whoever wrapped it and still holds it."""

    def __init__(self, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        self.module, self.name, self.function = module, name, function
        # accelerate keeps a module's forward under another name and calls it from there.
        wrapped = name == "forward" and "_old_forward" in vars(module)
        self.slot = "_old_forward" if wrapped else name
        self.before: Callable[..., Any] | None = vars(module).get(self.slot)
        self.active = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = self.before
        if before is None:
            before = partial(getattr(type(self.module), self.name), self.module)
        return self.function(before, *args, **kwargs) if self.active else before(*args, **kwargs)

    def install(self) -> None:
        vars(self.module)[self.slot] = self

    def undo(self) -> None:
        self.active = False
        own = vars(self.module)
        for slot in {self.name, self.slot, "_old_forward" if self.name == "forward" else self.name}:
            if own.get(slot) is not self:
                continue
            if self.before is not None:
                own[slot] = self.before
            elif slot == self.name:
                del own[slot]
            else:
                own[slot] = partial(getattr(type(self.module), self.name), self.module)


def _write_in_order(hooks: dict[int, Callable[..., Any]]) -> None:
    """Writes a module's hooks anew: torch.compile reads them in the order in which they were written (torch 2.11)."""
    in_order = list(hooks.items())
    hooks.clear()
    hooks.update(in_order)


def let_compiler_see_hooks() -> None:
    """Has torch.compile notice hooks that come and go, in this process.

    By default it takes a model without hooks for one that will never have any, and runs on what it compiled before, in
    silence. Noticing costs a few checks a call. What was compiled before is dropped, once, since it notices nothing.
    """
    from torch._dynamo import config

    if not config.skip_nnmodule_hook_guards:
        return
    config.skip_nnmodule_hook_guards = False
    # Settings hold for the thread that makes them; other threads see the default.
    entry = getattr(config, "_config", {}).get("skip_nnmodule_hook_guards")
    if entry is not None and hasattr(entry, "default"):
        entry.default = False
    torch.compiler.reset()
