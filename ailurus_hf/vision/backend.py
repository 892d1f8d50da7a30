"""The one file that knows transformers' internals: attention registration, and where a layer takes its attention bias."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..attention import biased_attention
from ..errors import UnsupportedModelError

# Support checks in transformers look for "sdpa", "flash" and "flex" in the name, so it holds none of them.
ATTENTION_NAME = "ailurus"


def ailurus_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention for transformers: a float mask of shape [B, 1, 1, L_k] is a count bias; all else goes to SDPA as it is."""
    is_bias = attention_mask is not None and attention_mask.shape[2] == 1 and attention_mask.is_floating_point()
    if not is_bias or query.shape[2] == 1:
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return result
    assert attention_mask is not None
    out = biased_attention(query, key, value, attention_mask[:, 0, 0], scale=scaling, dropout=dropout)
    return out.transpose(1, 2).contiguous(), None


def ailurus_mask(
    *args: Any,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """SDPA's mask; but none where nothing is masked, also in an export, which else writes out one of ones for N tokens."""
    if attention_mask is None and local_size is None and allow_is_bidirectional_skip:
        return None
    kwargs.update(
        attention_mask=attention_mask,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        local_size=local_size,
    )
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


# Registering is idempotent. Without the mask entry transformers would drop 2-D masks without a word.
AttentionInterface.register(ATTENTION_NAME, ailurus_attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, ailurus_mask)


def attention_configs(layers: Iterable[nn.Module]) -> list[PreTrainedConfig]:
    """The configs from which the attention modules in `layers` read their implementation, each once."""
    configs = {
        id(module.config): module.config
        for layer in layers
        for module in layer.modules()
        if isinstance(getattr(module, "config", None), PreTrainedConfig)
    }
    return list(configs.values())


def use_ailurus_attention(configs: Iterable[PreTrainedConfig]) -> list[tuple[PreTrainedConfig, str]]:
    """Switches configs to the registered attention; returns what to give to `restore_attention`.

    Eager attention stays, because it alone returns attention maps, and it takes the bias as its mask.
    """
    previous = [(config, config._attn_implementation) for config in configs]
    for config, implementation in previous:
        if implementation not in ("eager", None):
            config._attn_implementation = ATTENTION_NAME
    return previous


def restore_attention(previous: Iterable[tuple[PreTrainedConfig, str]]) -> None:
    """Undoes `use_ailurus_attention`; what the user has changed since stays."""
    for config, implementation in previous:
        if config._attn_implementation == ATTENTION_NAME:
            config._attn_implementation = implementation


def layers_of(encoder: nn.Module) -> nn.ModuleList:
    """The encoder's transformer layers, found by their number and not by their name."""
    depth = cast(PreTrainedConfig, encoder.config).num_hidden_layers
    found = [m for m in encoder.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{type(encoder).__name__} has {len(found)} lists of {depth} layers where one was expected; "
            "this version of transformers builds it in a way that is not known here"
        )
    return found[0]


def attention_mask_position(layer: nn.Module) -> int:
    """Where `layer.forward` takes its attention mask among the positional arguments."""
    names = list(inspect.signature(layer.forward).parameters)
    if "attention_mask" not in names:
        raise UnsupportedModelError(f"{type(layer).__name__}.forward takes no attention_mask, only {', '.join(names)}")
    return names.index("attention_mask")
