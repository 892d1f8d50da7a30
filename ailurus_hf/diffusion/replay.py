"""Blocks that ran on all tokens run once more, on representatives: what those would have added in the same step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .calls import with_argument

# A block and the arguments that it was called with, without its tokens.
BlockCall = tuple[nn.Module, tuple, dict[str, Any]]


def call_without_tokens(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> BlockCall:
    """A call to be made again with other tokens; those it was made with are not held."""
    return block, *with_argument(args, kwargs, 0, "hidden_states", None)


def replayed(
    calls: list[BlockCall],
    representatives: Tensor,
    with_bias: Callable[[nn.Module, tuple, dict], tuple[tuple, dict]],
) -> Tensor:
    """What the blocks make of representatives, Tensor[B, M, C].

    The blocks' hooks are not called: whoever put them there has seen the call.

    Args:
        calls: one block after the other.
        representatives: what the first one gets.
        with_bias: adds the weights of the representatives to a block's arguments.
    """
    text: Tensor | None = None
    for block, args, kwargs in calls:
        args, kwargs = with_argument(args, kwargs, 0, "hidden_states", representatives)
        if text is not None:
            # Blocks of joint attention give text tokens, too, which have seen representatives now.
            args, kwargs = with_argument(args, kwargs, 1, "encoder_hidden_states", text)
        args, kwargs = with_bias(block, args, kwargs)
        output = block.forward(*args, **kwargs)
        text, representatives = output if isinstance(output, tuple) else (None, output)
    return representatives
