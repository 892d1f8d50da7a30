"""The model families whose encoders can be reduced: one declaration each.

A family names its encoder class and says what surrounds the patch tokens. The layers, and how they take an attention
bias, are found by structure (backend.py). A decoder that runs on tokens, before any grid is made of them, is declared
in DECODERS: it can run on representatives too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..errors import UnsupportedModelError
from .backend import layers_of


def patch_grid(encoder: nn.Module, pixel_values: Tensor) -> tuple[int, int]:
    """Rows and columns of patches of images Tensor[B, 3, H, W]."""
    patch = cast(PreTrainedConfig, encoder.config).patch_size
    patch_height, patch_width = patch if isinstance(patch, Sequence) else (patch, patch)
    return pixel_values.shape[-2] // patch_height, pixel_values.shape[-1] // patch_width


@dataclass(frozen=True)
class Family:
    """An encoder class that can be reduced.

    name: what users call the family.
    encoder: the class's qualified name. It has to match exactly: a subclass may do anything between its layers.
    prefix: tokens before the patches (CLS, distillation); and the config's field that counts registers, if there is one.
    grid: the patch grid of an input.
    """

    name: str
    encoder: str
    prefix: int
    registers: str | None = None
    grid: Callable[[nn.Module, Tensor], tuple[int, int]] = patch_grid


@dataclass(frozen=True)
class TokenDecoder:
    """A module from tokens Tensor[B, L, C] to scores Tensor[B, L, K], for any L.

    decoder: the class's qualified name. suffix: the attribute that says how many tokens its layers have behind the patches.
    """

    decoder: str
    suffix: str | None = None


FAMILIES = (
    Family("ViT", "transformers.models.vit.modeling_vit.ViTModel", prefix=1),
    Family("DeiT", "transformers.models.deit.modeling_deit.DeiTModel", prefix=2),
    Family("ViTMSN", "transformers.models.vit_msn.modeling_vit_msn.ViTMSNModel", prefix=1),
    Family("I-JEPA", "transformers.models.ijepa.modeling_ijepa.IJepaModel", prefix=0),
    Family("DINOv2", "transformers.models.dinov2.modeling_dinov2.Dinov2Model", prefix=1),
    Family(
        "DINOv2 with registers",
        "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersModel",
        prefix=1,
        registers="num_register_tokens",
    ),
)

DECODERS = (
    TokenDecoder("ailurus_hf.segmenter.modeling_segmenter.MaskTransformerDecoder", suffix="num_labels"),
    TokenDecoder("ailurus_hf.segmenter.modeling_segmenter.LinearDecoder"),
)


@dataclass(frozen=True)
class FoundEncoder:
    """An encoder inside a model: its family, its layers, and the token decoder that reads it, if there is one."""

    family: Family
    encoder: nn.Module
    layers: Sequence[nn.Module]
    prefix: int
    decoder: nn.Module | None
    decoder_layers: Sequence[nn.Module]
    decoder_suffix: int


def find_encoders(target: nn.Module) -> list[FoundEncoder]:
    """Every supported encoder in a model; raises UnsupportedModelError, naming the class, where there is none."""
    families = {family.encoder: family for family in FAMILIES}
    decoders = {decoder.decoder: decoder for decoder in DECODERS}
    encoders = [module for module in target.modules() if _qualified_name(module) in families]
    token_decoders = [module for module in target.modules() if _qualified_name(module) in decoders]
    if not encoders:
        raise UnsupportedModelError(_unsupported(target))
    # With several encoders in one model nothing says whose tokens a decoder reads.
    decoder = token_decoders[0] if len(token_decoders) == len(encoders) == 1 else None
    suffix = decoders[_qualified_name(decoder)].suffix if decoder is not None else None
    return [
        FoundEncoder(
            families[_qualified_name(encoder)],
            encoder,
            list(layers_of(encoder)),
            _prefix(families[_qualified_name(encoder)], encoder),
            decoder,
            list(getattr(decoder, "layers", [])),
            0 if suffix is None else getattr(decoder, suffix),
        )
        for encoder in encoders
    ]


def _prefix(family: Family, encoder: nn.Module) -> int:
    registers = 0 if family.registers is None else getattr(encoder.config, family.registers)
    return family.prefix + int(registers)


def _qualified_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _unsupported(target: nn.Module) -> str:
    names = ", ".join(family.name for family in FAMILIES)
    known = {family.encoder.rsplit(".", 1)[1] for family in FAMILIES}
    for module in target.modules():
        for base in type(module).__mro__[1:]:
            if base.__name__ in known:
                return (
                    f"{type(module).__name__} is a subclass of {base.__name__} that nobody declared: what it does between "
                    f"its layers is not known. Supported encoders: {names} (CONTRIBUTING.md tells how to add one)"
                )
    return f"{type(target).__name__} holds no encoder whose tokens can be reduced. Supported encoders: {names}"
