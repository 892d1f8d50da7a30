"""Caches over steps alone, without token reduction: DeepCache for UNets, others for transformers.

DeepCache (Ma et al. 2024, arXiv 2312.00858), uniform, at its outermost skip connection: every `every`-th step runs
whole, and the steps between compute the first convolution, the last layer of the last up block and what follows; what
comes to that layer from below is that of the last whole step.

FirstBlockCache is diffusers' own: a step whose first block changes what it adds by less than `threshold` adds what all
later blocks added before. Its last block has to return text as well, which SD3's does not: it gets its own back, which
nothing reads. TaylorSeer (Liu et al. 2025, arXiv 2503.06923) is diffusers', too, in its lite mode: after three full
steps every `every`-th is full, and between them the network's output is drawn on in a straight line.

Reuse is the same by a fixed rhythm, the control of ours with as many full steps: between two of them tokens add what
all blocks but the first added in the last one, and nothing corrects that. Of the blocks that return text and image, as
SD3's do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    CacheMixin,
    FirstBlockCacheConfig,
    TaylorSeerCacheConfig,
    apply_first_block_cache,
    apply_taylorseer_cache,
)
from diffusers.hooks import HookRegistry
from torch import Tensor, nn

from ailurus_hf.hooks import Hooks

from .steps import Steps


def deep_cache(unet: Any, every: int) -> Callable[[], None]:
    """On a UNet; returns the call that undoes it."""
    hooks = Hooks()
    kept: dict[nn.Module, Any] = {}
    steps = Steps(unet, hooks, kept.clear)

    def keeps(module: nn.Module) -> Callable[..., Any]:
        def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if steps.number % every == 0:
                kept[module] = original(*args, **kwargs)
            return kept[module]

        return forward

    last = unet.up_blocks[-1]
    inner = [*last.resnets[:-1], *getattr(last, "attentions", [])[:-1]]
    for module in (*unet.down_blocks, unet.mid_block, *unet.up_blocks[:-1], *inner):
        hooks.replace_method(module, "forward", keeps(module))
    return hooks.remove


def first_block_cache(transformer: Any, threshold: float) -> Callable[[], None]:
    """On a transformer whose blocks are `transformer_blocks`; returns the call that undoes it."""
    return _with_hooks_of_diffusers(transformer, apply_first_block_cache, FirstBlockCacheConfig(threshold=threshold))


def taylorseer(transformer: Any, every: int) -> Callable[[], None]:
    """On a transformer as SD3's or Flux's; returns the call that undoes it."""
    config = TaylorSeerCacheConfig(cache_interval=every, taylor_factors_dtype=torch.float32, use_lite_mode=True)
    return _with_hooks_of_diffusers(transformer, apply_taylorseer_cache, config)


def _with_hooks_of_diffusers(transformer: Any, apply: Callable[[Any, Any], None], config: Any) -> Callable[[], None]:
    """A cache of diffusers on blocks and last projection, which begins anew with each generation."""
    hooks = Hooks()
    blocks = [*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", ())]

    def begin() -> None:
        HookRegistry.check_if_exists_or_initialize(transformer).reset_stateful_hooks()

    def in_context(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # SD3's has no such method of its own, and its pipeline names no context.
        with CacheMixin.cache_context(transformer, "generation"):
            return original(*args, **kwargs)

    Steps(transformer, hooks, begin)
    hooks.replace_method(transformer, "forward", in_context)
    if getattr(blocks[-1], "context_pre_only", False):
        hooks.replace_method(blocks[-1], "forward", _with_text)
    before = {module: vars(module).get("forward") for module in (*blocks, transformer.proj_out)}
    apply(transformer, config)

    def off() -> None:
        # diffusers' own removal leaves its registry and a `forward` on each module.
        for module, forward in before.items():
            if vars(module).pop("_diffusers_hook", None) is None:
                continue
            del module.forward
            if forward is not None:
                module.forward = forward
        vars(transformer).pop("_diffusers_hook", None)
        hooks.remove()

    return off


def reuse(transformer: Any, every: int) -> Callable[[], None]:
    """On a transformer as SD3's; returns the call that undoes it."""
    hooks, (_, *between, last) = Hooks(), list(transformer.transformer_blocks)
    kept: dict[str, Tensor] = {}
    steps = Steps(transformer, hooks, kept.clear)

    def passes(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if steps.number % every == 0:
            kept.setdefault("before", kwargs["hidden_states"])
            return original(*args, **kwargs)
        return kwargs["encoder_hidden_states"], kwargs["hidden_states"]

    def adds(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if steps.number % every == 0:
            text, out = original(*args, **kwargs)
            kept["added"] = out - kept.pop("before")
            return text, out
        return None, kwargs["hidden_states"] + kept["added"]

    for block in between:
        hooks.replace_method(block, "forward", passes)
    hooks.replace_method(last, "forward", adds)
    return hooks.remove


def _with_text(
    original: Callable[..., tuple[None, Tensor]], hidden_states: Tensor, encoder_hidden_states: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """The output of SD3's last block with the text that it got."""
    _, out = original(hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, **kwargs)
    return encoder_hidden_states, out
