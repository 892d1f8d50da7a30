"""Finding encoders: what in a model can be reduced, and the reason where nothing can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..errors import UnsupportedModelError
from .backend import layers_of, qualified_name
from .families import DECODERS, FAMILIES, READERS, Family, Reader
from .refused import REFUSED


@dataclass(frozen=True)
class FoundEncoder:
    """An encoder inside a model: its family, its layers, what reads it, and the token decoder behind it, if there is one.

    stack: the module that calls the layers; its output holds the hidden states before the encoder itself reads them.
    prefix, suffix: tokens before and behind the patches; queries join in front later.
    reader: the module around it that reads some hidden states, and its declaration.
    """

    family: Family
    encoder: nn.Module
    stack: nn.Module
    layers: Sequence[nn.Module]
    prefix: int
    suffix: int
    reader: tuple[nn.Module, Reader] | None
    decoder: nn.Module | None
    decoder_layers: Sequence[nn.Module]
    decoder_suffix: int


def find_encoders(target: nn.Module) -> list[FoundEncoder]:
    """Every supported encoder in a model; raises UnsupportedModelError, naming the class, where there is none."""
    families = {family.encoder: family for family in FAMILIES}
    decoders = {decoder.decoder: decoder for decoder in DECODERS}
    encoders = [module for module in target.modules() if qualified_name(module) in families]
    token_decoders = [module for module in target.modules() if qualified_name(module) in decoders]
    if not encoders:
        raise UnsupportedModelError(_unsupported(target))
    # With several encoders in one model nothing says whose tokens a decoder reads.
    decoder = token_decoders[0] if len(token_decoders) == len(encoders) == 1 else None
    suffix = decoders[qualified_name(decoder)].suffix if decoder is not None else None
    found = []
    for encoder in encoders:
        family = families[qualified_name(encoder)]
        stack, layers = layers_of(encoder)
        found.append(
            FoundEncoder(
                family,
                encoder,
                stack,
                list(layers),
                (family.prefix(encoder) if callable(family.prefix) else family.prefix)
                + _count(encoder, family.registers),
                _count(encoder, family.suffix),
                _reader(target, encoder),
                decoder,
                list(getattr(decoder, "layers", [])),
                0 if suffix is None else getattr(decoder, suffix),
            )
        )
    return found


def _count(encoder: nn.Module, field: str | None) -> int:
    return 0 if field is None else int(getattr(encoder.config, field))


def _reader(target: nn.Module, encoder: nn.Module) -> tuple[nn.Module, Reader] | None:
    readers = {reader.reader: reader for reader in READERS}
    around = [m for m in target.modules() if qualified_name(m) in readers and encoder in m.modules()]
    return (around[0], readers[qualified_name(around[0])]) if len(around) == 1 else None


def _unsupported(target: nn.Module) -> str:
    name = type(target).__name__
    known = {family.encoder.rsplit(".", 1)[1] for family in FAMILIES}
    for module in target.modules():
        for base in type(module).__mro__[1:]:
            if base.__name__ in known:
                return (
                    f"{type(module).__name__} is a subclass of {base.__name__} that nobody declared: what it does between "
                    f"its layers is not known. {_supported()} (CONTRIBUTING.md tells how to add one)"
                )
    for module in target.modules():
        for refused, reason in REFUSED.items():
            if f"{type(module).__module__}.".startswith(f"transformers.models.{refused}."):
                return f"{name} cannot be reduced: {type(module).__name__} is refused because {reason}. {_supported()}"
    return f"{name} holds no encoder whose tokens can be reduced. {_supported()}"


def _supported() -> str:
    return f"Supported encoders: {', '.join([*(family.name for family in FAMILIES), 'SegFormer', 'VitDet', 'SAM', 'SAM-HQ'])}"
