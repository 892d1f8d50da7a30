"""The one file that knows transformers' internals: attention registration, the layers, and how they take a bias."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from ..attention import biased_attention
from ..errors import UnsupportedModelError
from ..hooks import Hooks
from .registry import qualified_name

# Support checks in transformers look for "sdpa", "flash" and "flex" in the name, so it holds none of them.
ATTENTION_NAME = "ailurus"
EAGER_NAME = "ailurus_maps"
# The argument of a bias for layers that hand unknown arguments to the attention function and take no mask.
KEY_BIAS = "ailurus_key_bias"
# The arguments by which layers take an attention bias.
BIAS_PARAMETERS = ("attention_mask", "relative_position_bias", "attn_mask")
# Attention that writes out its probabilities, and the module for dropout through which it sends them
# (weighted_probabilities.py).
WRITES_PROBABILITIES = {"transformers.models.blip.modeling_blip.BlipAttention": "dropout"}


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
    """Attention for transformers: a float mask [B, 1, 1, L_k] is a count bias; all else goes to SDPA unchanged."""
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
    """Eager attention with its maps, for layers that take no mask: transformers' own ignores unknown arguments."""
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    for bias in (attention_mask, ailurus_key_bias):
        scores = scores if bias is None else scores + bias
    weights = torch.dropout(scores.softmax(-1), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


# Registering is idempotent. Without the mask entry transformers would drop 2-D masks without a word.
AttentionInterface.register(ATTENTION_NAME, ailurus_attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
AttentionInterface.register(EAGER_NAME, eager_attention_forward)
AttentionMaskInterface.register(EAGER_NAME, eager_mask)


class AttentionConfig:
    """A config as an attention module reads it, with the registered attention instead of the model's.

    The model's own config stays what it is, and what the user sets there later counts: eager attention stays, because
    it alone returns attention maps, and it takes the bias as its mask, or by `eager_as` where layers take no mask.
    """

    def __init__(self, config: PreTrainedConfig | AttentionConfig, eager_as: str, name: str) -> None:
        self.ailurus_replaces, self.ailurus_eager_as, self.ailurus_name = config, eager_as, name

    @property
    def _attn_implementation(self) -> str | None:
        before = self.ailurus_replaces._attn_implementation
        if before is None:
            return None
        return self.ailurus_eager_as if before == "eager" else self.ailurus_name

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("__", "ailurus_")):  # a copy asks before it has the config
            raise AttributeError(name)
        return getattr(self.ailurus_replaces, name)


def use_attention(
    hooks: Hooks, layers: Iterable[nn.Module], eager_as: str = "eager", name: str = ATTENTION_NAME
) -> None:
    """Has the attention of `layers` take a registered function, until `hooks` are removed; eager attention another."""
    for layer in layers:
        for module in layer.modules():
            if isinstance(config := vars(module).get("config"), (PreTrainedConfig, AttentionConfig)):
                hooks.replace(module, "config", AttentionConfig(config, eager_as, name))


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
    """A context in which a module's own weights can be read, even if accelerate offloads them until its forward."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    context: AbstractContextManager[Any] = align_module_device(module)
    return context


def unwrapped(module: nn.Module) -> nn.Module:
    """What is inside wrappers that hand on any argument to one module (of torch.compile, checkpoints, FSDP)."""
    while len(children := list(module.children())) == 1:
        kinds = {p.kind for p in inspect.signature(module.forward).parameters.values()}
        if not kinds <= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
            break
        module = children[0]
    return module


def _is_layer(module: nn.Module) -> bool:
    return "hidden_states" in parameters_of(module)


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of a module's forward, in order."""
    return tuple(inspect.signature(unwrapped(module).forward).parameters)


def bias_parameter(encoder: nn.Module, layer: nn.Module) -> str:
    """The argument by which a layer of an encoder takes an attention bias.

    Raises:
        UnsupportedModelError: there is none.
    """
    layer = unwrapped(layer)
    parameters = inspect.signature(layer.forward).parameters
    for name in BIAS_PARAMETERS:
        if name in parameters:
            return name
    if getattr(encoder, "_supports_sdpa", False) and attention_of_layer(layer) is not None:
        return KEY_BIAS
    if _takes_any(layer):
        attention = [module for module in layer.modules() if module is not layer]
        if any(qualified_name(module) in WRITES_PROBABILITIES for module in attention):
            return KEY_BIAS
        # What an encoder that can use SDPA is told, it tells the attention function of transformers' registry.
        by_registry = getattr(encoder, "_supports_sdpa", False)
        if by_registry and any(_takes_any(module) and hasattr(module, "config") for module in attention):
            return KEY_BIAS
    raise UnsupportedModelError(
        f"{type(layer).__name__}.forward takes no attention_mask, only {', '.join(parameters)}, and its attention is "
        "not one of transformers' registry: there is no way to tell it how many tokens a representative stands for"
    )


def attention_of_layer(layer: nn.Module) -> nn.Module | None:
    """The one attention that would take a bias of a layer that takes none itself (relayed_bias.py); None elsewhere."""
    if any(name in parameters_of(layer) for name in BIAS_PARAMETERS) or _takes_any(layer):
        return None
    found = [m for m in layer.modules() if m is not layer and _takes_any(m) and hasattr(m, "config")]
    return found[0] if len(found) == 1 else None


def _takes_any(module: nn.Module) -> bool:
    """Whether a module's forward takes keyword arguments that it does not name."""
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(module.forward).parameters.values())
