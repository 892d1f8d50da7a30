"""FLOPs of a transformer block on one image, by how many tokens attention and the rest of it run on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from .stacks import Stack

# What FLOPs of cross-attention are counted for: the length of CLIP's texts.
TEXT_TOKENS = 77


def block_flops(block: Any, queries: int, keys: int, others: int, attended: int = 1, text: int = TEXT_TOKENS) -> float:
    """FLOPs of a block of self-attention, cross-attention (where it has it) and an MLP.

    Args:
        queries: tokens that ask in self-attention.
        keys: tokens that are asked.
        others: tokens in all the rest.
        attended: images (frames) whose keys a query takes.
        text: text tokens in cross-attention.
    """
    attention, cross = block.attn1, getattr(block, "attn2", None)
    rest = [block.ff] if cross is None else [block.ff, cross.to_q, cross.to_out]
    flops: float = (
        queries * _linear_flops([attention.to_q, attention.to_out])
        + keys * _linear_flops([attention.to_k, attention.to_v])
        + others * _linear_flops(rest)
        + 4.0 * queries * keys * attended * attention.inner_dim
    )
    if cross is not None:
        flops += text * (_linear_flops([cross.to_k, cross.to_v]) + 4.0 * others * cross.inner_dim)
    return flops


def joint_block_flops(block: Any, queries: int, keys: int, others: int, attended: int, text: int) -> float:
    """FLOPs of a block of joint attention; `queries`, `keys` and `others` are image tokens."""
    attention = next(getattr(block, name) for name in ("attn", "attn1", "attention") if hasattr(block, name))
    # Without maps of its own for text, all tokens go through the same.
    single = getattr(attention, "add_q_proj", None) is None
    flops = 4.0 * (queries + text) * (keys + text) * attention.inner_dim
    if getattr(block, "attn2", None) is not None:
        flops += 4.0 * queries * keys * attention.inner_dim
    for name, part in block.named_children():
        of_image: list[nn.Module] = []
        of_text: list[nn.Module] = []
        # Once an image, from its timestep.
        if not name.startswith(("norm", "img_mod", "txt_mod", "adaLN")):
            for path, module in part.named_modules():
                is_text = name in ("ff_context", "txt_mlp") or path.startswith(("add_", "to_add_out"))
                (of_text if is_text else of_image).append(module)
        flops += _own_flops(of_image) * (others + text * single) + _own_flops(of_text) * text
    return flops


def wan_block_flops(block: Any, queries: int, keys: int, others: int, attended: int, text: int) -> float:
    """FLOPs of a block of Wan on one video; its text is projected in cross-attention alone."""
    own, cross = block.attn1, block.attn2
    feed_forward = block.ffn if hasattr(block, "ffn") else block.ff
    flops: float = 4.0 * own.inner_dim * (queries * keys + others * text)
    flops += others * _linear_flops([own, cross.to_q, cross.to_out, feed_forward])
    return flops + text * _linear_flops([cross.to_k, cross.to_v])


def kandinsky_block_flops(block: Any, queries: int, keys: int, others: int, attended: int, text: int) -> float:
    """The same of a block of Kandinsky 5."""
    own, cross = block.self_attention, block.cross_attention
    flops: float = 4.0 * own.to_query.out_features * (queries * keys + others * text)
    flops += others * _linear_flops([own, cross.to_query, cross.out_layer, block.feed_forward])
    return flops + text * _linear_flops([cross.to_key, cross.to_value])


def projection_flops(stack: Stack, num_tokens: int) -> float:
    """FLOPs of the linear maps into and out of a stack that goes from a map to a map; 0 of others."""
    if not stack.on_maps:
        return 0.0
    block: Any = stack.blocks[0]
    return 4.0 * stack.in_channels * block.attn1.inner_dim * num_tokens


def _linear_flops(parts: Iterable[nn.Module]) -> float:
    return _own_flops(module for part in parts for module in part.modules())


def _own_flops(modules: Iterable[nn.Module]) -> float:
    linears = [module for module in modules if isinstance(module, nn.Linear)]
    return sum(2.0 * linear.in_features * linear.out_features for linear in linears)
