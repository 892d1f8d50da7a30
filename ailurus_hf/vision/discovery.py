"""Finding encoders: what in a model can be reduced, and the reason where nothing can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..errors import UnsupportedModelError
from . import families as _families  # noqa: F401  (declares them)
from .backend import layers_of
from .refused import REFUSED
from .registry import FAMILIES, READERS, TOKEN_DECODERS, Family, Reader, qualified_name


@dataclass(frozen=True, eq=False)
class FoundEncoder:
    """An encoder inside a model: its family, its layers, what reads it, and its token decoder, if there is one.

    stack: the module that calls the layers; its output holds the hidden states before the encoder itself reads them.
    prefix, suffix: tokens before and after the patches; queries join before them later.
    reader: the module around it that reads some hidden states, and its declaration.
    around_decoder: the smallest module with encoder and decoder in it.
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
    around_decoder: nn.Module | None


def find_encoders(target: nn.Module) -> list[FoundEncoder]:
    """Every supported encoder in a model; raises UnsupportedModelError, naming the class, where there is none."""
    encoders = [module for module in target.modules() if qualified_name(module) in FAMILIES]
    token_decoders = [module for module in target.modules() if qualified_name(module) in TOKEN_DECODERS]
    if not encoders:
        raise UnsupportedModelError(_unsupported(target))
    # With several encoders in one model nothing says whose tokens a decoder reads.
    decoder = token_decoders[0] if len(token_decoders) == len(encoders) == 1 else None
    return [_found(target, encoder, decoder) for encoder in encoders]


def _found(target: nn.Module, encoder: nn.Module, decoder: nn.Module | None) -> FoundEncoder:
    family = FAMILIES[qualified_name(encoder)]
    stack, layers = layers_of(encoder)
    prefix = family.prefix(encoder) if callable(family.prefix) else family.prefix
    decoder_suffix = None if decoder is None else TOKEN_DECODERS[qualified_name(decoder)].suffix
    return FoundEncoder(
        family=family,
        encoder=encoder,
        stack=stack,
        layers=tuple(layers),
        prefix=prefix + _count(encoder, family.registers),
        suffix=_count(encoder, family.suffix),
        reader=_reader(target, encoder),
        decoder=decoder,
        decoder_layers=tuple(getattr(decoder, "layers", ())),
        decoder_suffix=0 if decoder_suffix is None else getattr(decoder, decoder_suffix),
        around_decoder=None if decoder is None else _smallest_around(target, encoder, decoder),
    )


def _count(encoder: nn.Module, field: str | None) -> int:
    return 0 if field is None else int(getattr(encoder.config, field))


def _reader(target: nn.Module, encoder: nn.Module) -> tuple[nn.Module, Reader] | None:
    around = [m for m in target.modules() if qualified_name(m) in READERS and encoder in m.modules()]
    return (around[0], READERS[qualified_name(around[0])]) if len(around) == 1 else None


def _smallest_around(target: nn.Module, *inside: nn.Module) -> nn.Module:
    """The innermost module of `target` that holds all of `inside`."""
    around = target
    while inner := [child for child in around.children() if {*inside} <= {*child.modules()}]:
        around = inner[0]
    return around


def _unsupported(target: nn.Module) -> str:
    name = type(target).__name__
    known = {key.rsplit(".", 1)[1] for key in FAMILIES}
    for module in target.modules():
        for base in type(module).__mro__[1:]:
            if base.__name__ in known:
                return (
                    f"{type(module).__name__} is a subclass of {base.__name__} that nobody declared: what it does "
                    f"between its layers is not known. {_supported()} (CONTRIBUTING.md tells how to add one)"
                )
    for module in target.modules():
        for refused, reason in REFUSED.items():
            if f"{type(module).__module__}.".startswith(f"transformers.models.{refused}."):
                return f"{name} cannot be reduced: {type(module).__name__} is refused because {reason}. {_supported()}"
    for module in target.modules():
        if type(module).__module__.startswith("timm."):
            return (
                f"{name} is a model of timm by itself: load it into transformers, TimmWrapperModel.from_pretrained("
                f'"timm/…"), and reduce that. {_supported()}'
            )
    return f"{name} holds no encoder whose tokens can be reduced. {_supported()}"


def _supported() -> str:
    # Those that came from outside are named last, whenever they came.
    families = sorted(FAMILIES.values(), key=lambda family: not family.key.startswith("transformers."))
    names = [*(family.name for family in families), "SegFormer", "VitDet", "SAM", "SAM-HQ"]
    return f"Supported encoders: {', '.join(names)}"
