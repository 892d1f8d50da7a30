"""Hidden states: transformers collects the outputs of layers, M tokens each; they are unmerged once, at the end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .encoder_plan import EncoderPlan
from .forward_state import ForwardState


def asks_for_states(module: nn.Module, kwargs: dict) -> bool:
    """Whether a call, or the config, asks for hidden states."""
    asked = kwargs.get("output_hidden_states")
    return bool(getattr(module.config, "output_hidden_states", False) if asked is None else asked)


def unmerge_hidden_states(plan: EncoderPlan, state: ForwardState, output: Any) -> Any:
    """The output, whose hidden states that are read are N tokens long."""
    if not state.reductions or state.states_unmerged:
        return output
    if isinstance(output, tuple):
        # return_dict=False: hidden states are the tuple of [B, L, C], attention maps that of [B, heads, L, L].
        parts = [isinstance(part, tuple) and part[-1].ndim == 3 for part in output]
        state.states_unmerged = any(parts)
        return tuple(
            _unmerge_each(plan, state, part) if is_states else part
            for part, is_states in zip(output, parts, strict=True)
        )
    if getattr(output, "hidden_states", None) is not None:
        output["hidden_states"] = _unmerge_each(plan, state, output["hidden_states"])
        state.states_unmerged = True
    return output


def _unmerge_each(
    plan: EncoderPlan, state: ForwardState, hidden_states: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    unmerged = []
    for location, hidden in enumerate(hidden_states):
        is_read = state.wanted is None or location in state.wanted
        if hidden is not None and is_read:
            hidden = _unmerge_at(plan, state, location, hidden)
        unmerged.append(hidden)
    return tuple(unmerged)


def _unmerge_at(plan: EncoderPlan, state: ForwardState, location: int, hidden: Tensor) -> Tensor:
    """The hidden state at a location, from what was collected there."""
    first = state.reductions[0]
    if location == first.location == 0:
        if hidden.shape[1] == plan.found.prefix + state.num_tokens + state.suffix:
            return hidden
        # Collected as the first layer's input, which was merged already.
        prefix, _, suffix = state.split(hidden, first.clusters.num_clusters)
        return torch.cat([prefix, first.tokens, suffix], 1)
    is_last = location == plan.restore_location and not state.through_decoder
    if is_last or location > plan.restore_location or location - 1 in state.between:
        return hidden
    for reduction in reversed(state.reductions):
        if reduction.location < location:
            return state.unmerge(hidden, reduction, plan.config.restore)
    return hidden
