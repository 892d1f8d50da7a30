"""What a reducer says of a forward that was not what its user may think: errors and warnings."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import AiluRusError
from .stacks import self_attentions

if TYPE_CHECKING:
    from .reducer import NetworkReducer

log = logging.getLogger(__name__)


def check_levels(reducer: NetworkReducer) -> None:
    """Raises AiluRusError where keep_ratio is by levels, and the network has none of them."""
    ratios = reducer.config.keep_ratio
    if not isinstance(ratios, Mapping) or not reducer.last_levels:
        return
    levels = set(reducer.last_levels.values())
    named = ratios.keys() | {n for n, level in (reducer.config.levels or {}).items() if level.keep_ratio is not None}
    if "largest" not in named and not levels & named:
        raise AiluRusError(
            f"keep_ratio is given for the levels {sorted(named)}, but {type(reducer.network).__name__} has tokens at "
            f"{sorted(levels)} alone, and none would be reduced: give it for one of these, or one number for all"
        )


def say_that_nothing_was_reduced(reducer: NetworkReducer, most: int) -> None:
    """Once. most: tokens of the largest grid."""
    if reducer.config.keep_ratio != 1 and "nothing" not in reducer.said:
        reducer.said.add("nothing")
        log.warning(
            "%s ran on all tokens: its largest grid has %d of them, and those of fewer than min_tokens=%d, and "
            "levels that keep_ratio leaves out, are left alone",
            type(reducer.network).__name__,
            most,
            reducer.config.min_tokens,
        )


def notice_lost_processors(reducer: NetworkReducer) -> None:
    """Says so where others took the place of its processors since the last forward."""
    lost = reducer.without_processor() if reducer.processor is not None else []
    if lost and lost != reducer.lost_processors:
        layers = self_attentions(reducer.stacks)
        log.warning(
            "%d of %d self-attention layers of %s no longer have the processor of apply_ailurus and run as they "
            "are now, on %s: load_ip_adapter, enable_attention_slicing and fuse_qkv_projections replace "
            "processors. Call apply_ailurus again. Pipelines with perturbed attention replace them in every call",
            len(lost),
            len(layers),
            type(reducer.network).__name__,
            ", ".join(sorted({type(layers[name].processor).__name__ for name in lost})),
        )
    reducer.lost_processors = lost
