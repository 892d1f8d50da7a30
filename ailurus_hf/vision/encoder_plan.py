"""EncoderPlan: what happens in every forward of one encoder, checked and fixed before the first hook is added."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import nn

from ..config import AiluRusConfig
from ..errors import AiluRusError
from . import adapters
from .backend import bias_parameter, parameters_of
from .discovery import FoundEncoder


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """What happens around one layer.

    index: 0 for the first layer.
    reduces: which of the locations the layer begins after, by its number in the settings; None: none.
    may_restore: whether all tokens may be back after the layer.
    adapters: what makes the arguments of this layer follow the clusters.
    """

    index: int
    reduces: int | None
    may_restore: bool
    adapters: tuple[adapters.Adapter, ...]


@dataclass(frozen=True, eq=False)
class EncoderPlan:
    """How one encoder is reduced.

    found: the encoder and its surroundings.
    config: the settings.
    depth, name: the number of its layers and its class's name.
    restore_location: R; the layers after the R-th run on all tokens.
    through_decoder: whether the token decoder runs on representatives, too.
    layers: of each layer from the first location to R.
    parameters, encoder_parameters, decoder_parameters: the names of the arguments of a layer, of the encoder, and of a
        layer of the decoder.
    bias, decoder_bias: the argument by which such a layer takes a bias.
    takes_masks: whether a mask that a layer is given is known to follow the clusters.
    """

    found: FoundEncoder
    config: AiluRusConfig
    name: str
    restore_location: int
    through_decoder: bool
    layers: tuple[LayerPlan, ...]
    parameters: tuple[str, ...]
    encoder_parameters: tuple[str, ...]
    decoder_parameters: tuple[str, ...]
    bias: str
    decoder_bias: str
    takes_masks: bool

    @property
    def depth(self) -> int:
        return len(self.found.layers)

    @property
    def reduced_layers(self) -> list[nn.Module]:
        """Layers that run on representatives."""
        return [self.found.layers[layer.index] for layer in self.layers]

    def is_last(self, index: int) -> bool:
        """Whether all tokens are back after layer `index`, 0 the first."""
        return index == self.restore_location - 1

    def targets(self, num_tokens: int) -> list[int | None]:
        """M at each location, None where a location leaves as many tokens as came to it."""
        targets: list[int | None] = []
        left = num_tokens
        for number in range(len(self.config.locations)):
            count = self.config.clusters_for(num_tokens, number)
            targets.append(count if count < left else None)
            left = min(count, left)
        return targets


def plan_encoder(found: FoundEncoder, config: AiluRusConfig) -> EncoderPlan:
    """The plan of an encoder; AiluRusError if settings do not fit it, UnsupportedModelError if it takes no bias."""
    depth, locations, name = len(found.layers), config.locations, type(found.encoder).__name__
    if locations[-1] >= depth:
        raise AiluRusError(
            f"cluster_location {locations[-1]} leaves none of the {depth} layers of {name} to run "
            f"on fewer tokens: use 0 to {depth - 1}"
        )
    if config.restore_location is not None and config.restore_location > depth:
        raise AiluRusError(
            f"restore_location {config.restore_location} is past the {depth} layers of {name}: "
            f"use {locations[-1] + 1} to {depth}"
        )
    in_layers = {id(module) for layer in found.layers for module in layer.modules()}
    shared_bias = [m for m in adapters.relative_bias_modules(found.encoder) if id(m) not in in_layers]
    parameters, restore_location = parameters_of(found.layers[0]), config.restore_location or depth
    decoder_layer = found.decoder_layers[0] if found.decoder_layers else None
    return EncoderPlan(
        found=found,
        config=config,
        name=name,
        restore_location=restore_location,
        through_decoder=config.restores_after_decoder and found.decoder is not None,
        layers=tuple(
            LayerPlan(
                index,
                locations.index(index) if index in locations else None,
                index == restore_location - 1 or found.family.between is not None,
                _adapters_of(found, index, shared_bias, parameters),
            )
            for index in range(locations[0], restore_location)
        ),
        parameters=parameters,
        encoder_parameters=parameters_of(found.encoder),
        decoder_parameters=() if decoder_layer is None else parameters_of(decoder_layer),
        bias=bias_parameter(found.encoder, found.layers[0]),
        decoder_bias="" if decoder_layer is None else bias_parameter(found.encoder, decoder_layer),
        takes_masks=bool(shared_bias) or found.family.queries is not None or found.family.layout is not None,
    )


def _adapters_of(
    found: FoundEncoder, index: int, shared_bias: list[nn.Module], parameters: tuple[str, ...]
) -> tuple[adapters.Adapter, ...]:
    """For what a layer is given beside tokens and a bias."""
    chosen: list[adapters.Adapter] = []
    if modules := shared_bias + adapters.relative_bias_modules(found.layers[index]):
        chosen.append(partial(adapters.add_relative_bias, tuple(modules)))
    if "position_embeddings" in parameters:
        chosen.append(adapters.rotate_at_centroids)
    if found.family.queries is not None:
        chosen.append(adapters.follow_query_mask)
    if found.family.layout is not None:
        chosen.append(adapters.mask_padding)
    return tuple(chosen)
