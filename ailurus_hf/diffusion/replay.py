"""Blocks that ran on all tokens run once more, on representatives: what those would have added in the same step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .calls import with_argument
from .token_order import TokenOrder

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
    for block, args, kwargs in calls:
        args, kwargs = with_bias(block, *with_argument(args, kwargs, 0, "hidden_states", representatives))
        representatives = block.forward(*args, **kwargs)
    return representatives


def replayed_jointly(
    calls: list[BlockCall], tokens: Tensor, order: TokenOrder, gives_image_first: bool = False
) -> Tensor:
    """The same of blocks of joint attention, which give text tokens, too, that have seen representatives.

    Args:
        tokens: what the first block gets: representatives, or text and representatives.
        order: of text and image in one sequence.
        gives_image_first: whether blocks return image and text, and not text and image.

    Returns:
        What the last block gives, without its text where that is apart.
    """
    text: Tensor | None = None
    for block, args, kwargs in calls:
        if text is not None and text_of(args, kwargs) is None:
            # From here on in one sequence. What stands after the image is among its tokens.
            tokens, text = dataclasses.replace(order, references=0).join(text, tokens), None
        args, kwargs = with_argument(args, kwargs, 0, "hidden_states", tokens)
        if text is not None:
            args, kwargs = with_argument(args, kwargs, 1, "encoder_hidden_states", text)
        output = block.forward(*args, **kwargs)
        if not isinstance(output, tuple):
            tokens = output
        elif gives_image_first:
            tokens, text = output
        else:
            text, tokens = output
    return tokens


def text_of(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    return args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
