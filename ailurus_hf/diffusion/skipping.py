"""Stacks that do not run in the steps between full ones: their blocks give what they were given."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..hooks import Hooks
from .compiled_blocks import eager_in_compiled_blocks
from .forward_state import Forwards, ForwardState, StackState
from .replay import text_of


class Skipping:
    """Has the blocks of a network run or not, as the forward's state says.

    Args:
        hooks: of the network's reducer. forwards: where its forwards stand.
        gives_image_first: as in `replay.replayed_jointly`.

    Attributes:
        gives_text: by classes of blocks, whether they return text beside the image.
    """

    def __init__(self, hooks: Hooks, forwards: Forwards, gives_image_first: bool) -> None:
        self.hooks, self.forwards, self.gives_image_first = hooks, forwards, gives_image_first
        self.gives_text: dict[type, bool] = {}

    def install(self, blocks: Iterable[nn.Module]) -> None:
        """On blocks that may be skipped."""
        for block in blocks:
            self.hooks.replace_method(block, "forward", partial(self.run_or_skip, type(block)))

    def run_or_skip(self, kind: type, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A block of this class: what it gives, or, where its stack is skipped, what it was given."""
        if self.is_skipping():
            return passed_on(args, kwargs, self.gives_text[kind], self.gives_image_first)
        output = forward(*args, **kwargs)
        if kind not in self.gives_text:
            self.gives_text[kind] = isinstance(output, tuple)
        return output

    @eager_in_compiled_blocks
    def is_skipping(self) -> bool:
        """Whether the stack that is running is skipped."""
        running = None if self.forwards.current is None else self.forwards.current.stack
        return running is not None and running.skipped


def with_kept(forward: ForwardState, running: StackState) -> Tensor:
    """All tokens after a stack that was skipped: each adds what was kept."""
    assert running.kept is not None and forward.additions is not None
    added = forward.additions.apart(running.stack.name)
    assert added is not None
    return running.kept + added


def passed_on(args: tuple, kwargs: dict[str, Any], gives_text: bool, gives_image_first: bool) -> Any:
    """What a block gives that is called so and adds nothing.

    Args:
        gives_text: whether it returns text and image, or one sequence.
        gives_image_first: as in `replay.replayed_jointly`.
    """
    tokens = args[0] if args else kwargs["hidden_states"]
    if not gives_text:
        return tokens
    text = text_of(args, kwargs)
    return (tokens, text) if gives_image_first else (text, tokens)
