"""The one file that knows transformers' internals: attention registration, where the layers are, and where one takes a bias."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from ..attention import biased_attention
from ..errors import UnsupportedModelError

# Support checks in transformers look for "sdpa", "flash" and "flex" in the name, so it holds none of them.
ATTENTION_NAME = "ailurus"
EAGER_NAME = "ailurus_maps"
# The argument of a bias for layers that hand unknown arguments to the attention function and take no mask.
KEY_BIAS = "ailurus_key_bias"
# Attention that writes out its probabilities, and the module for dropout through which it sends them (own_attention.py).
OWN_ATTENTION = {"transformers.models.blip.modeling_blip.BlipAttention": "dropout"}


def ailurus_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    ailurus_key_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention for transformers: a float mask of shape [B, 1, 1, L_k] is a count bias; all else goes to SDPA as it is."""
    attention_mask = ailurus_key_bias if attention_mask is None else attention_mask
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


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    ailurus_key_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Eager attention, which returns its maps, for layers that take no mask: transformers' own ignores what it does not know."""
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    for bias in (attention_mask, ailurus_key_bias):
        scores = scores if bias is None else scores + bias
    weights = torch.dropout(scores.softmax(-1), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


# Registering is idempotent. Without the mask entry transformers would drop 2-D masks without a word.
AttentionInterface.register(ATTENTION_NAME, ailurus_attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, ailurus_mask)
AttentionInterface.register(EAGER_NAME, eager_attention_forward)
AttentionMaskInterface.register(EAGER_NAME, eager_mask)


def attention_configs(layers: Iterable[nn.Module]) -> list[PreTrainedConfig]:
    """The configs from which the attention modules in `layers` read their implementation, each once."""
    configs = {id(m.config): m.config for layer in layers for m in layer.modules() if _uses_interface(m)}
    return list(configs.values())


def _uses_interface(module: nn.Module) -> bool:
    """Whether a module takes its attention function from transformers' registry, by its config."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return (
        isinstance(getattr(module, "config", None), PreTrainedConfig)
        and code is not None
        and "ALL_ATTENTION_FUNCTIONS" in code.co_names
    )


def use_ailurus_attention(configs: Iterable[PreTrainedConfig], eager_as: str = "eager") -> Callable[[], None]:
    """Switches configs to the registered attention; returns the call that switches them back.

    Eager attention stays, because it alone returns attention maps, and it takes the bias as its mask; or it becomes
    `eager_as`, where layers take no mask.
    """
    switched = []
    for config in configs:
        before = config._attn_implementation
        after = {"eager": eager_as, None: before}.get(before, ATTENTION_NAME)
        config._attn_implementation = after
        switched.append((config, before, after))

    def restore() -> None:
        for config, before, after in switched:
            if config._attn_implementation == after:  # what the user has changed since stays
                config._attn_implementation = before

    return restore


# The one model of timm, and the one kind of layer in it, whose forward is known here.
TIMM_MODEL = "timm.models.vision_transformer.VisionTransformer"
TIMM_LAYER = "timm.models.vision_transformer.Block"


def layers_of(encoder: nn.Module) -> tuple[nn.Module, nn.ModuleList | nn.Sequential]:
    """The encoder's transformer layers and the module that calls them, found by their number and not by their name."""
    if isinstance(wrapped := getattr(encoder, "timm_model", None), nn.Module):
        return wrapped, _timm_layers(wrapped)
    depth = cast(PreTrainedConfig, encoder.config).num_hidden_layers
    found = [
        (parent, child)
        for parent in encoder.modules()
        for child in parent.children()
        if isinstance(child, nn.ModuleList) and len(child) == depth and _is_layer(child[0])
    ]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{type(encoder).__name__} has {len(found)} lists of {depth} layers where one was expected; "
            "this version of transformers builds it in a way that is not known here"
        )
    return found[0]


def _timm_layers(model: Any) -> nn.Sequential:
    kinds = {qualified_name(model), *map(qualified_name, getattr(model, "blocks", []))}
    if kinds != {TIMM_MODEL, TIMM_LAYER}:
        names = ", ".join(sorted(name.rsplit(".", 1)[1] for name in kinds))
        raise UnsupportedModelError(
            f"of timm's models only VisionTransformer with layers of class Block can be reduced, this one is of {names}"
        )
    layers: nn.Sequential = model.blocks
    return layers


def weights_in_place(module: nn.Module) -> AbstractContextManager[Any]:
    """A context in which a module's own weights can be read, also where accelerate keeps them away until its forward."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    context: AbstractContextManager[Any] = align_module_device(module)
    return context


def qualified_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _is_layer(module: nn.Module) -> bool:
    return "hidden_states" in inspect.signature(module.forward).parameters


def parameters_of(layer: nn.Module) -> list[str]:
    """The names of the arguments of `layer.forward`, in order."""
    return list(inspect.signature(layer.forward).parameters)


def bias_parameter(layer: nn.Module) -> str:
    """The argument by which `layer` takes an attention bias."""
    parameters = inspect.signature(layer.forward).parameters
    for name in ("attention_mask", "relative_position_bias", "attn_mask"):
        if name in parameters:
            return name
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if takes_any and any(_uses_interface(m) or qualified_name(m) in OWN_ATTENTION for m in layer.modules()):
        return KEY_BIAS
    raise UnsupportedModelError(
        f"{type(layer).__name__}.forward takes no attention_mask, only {', '.join(parameters)}, and its attention is not "
        "one of transformers' registry: there is no way to tell it how many tokens a representative stands for"
    )
