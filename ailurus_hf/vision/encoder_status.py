"""What an encoder's last forward did at each location: tokens, clusters, and FLOPs by the layers' sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..status import LocationStatus
from .flops import layers_flops

if TYPE_CHECKING:
    from .encoder import EncoderReducer


def encoder_locations(reducer: EncoderReducer) -> list[LocationStatus]:
    """One LocationStatus a location."""
    return [_place(reducer, number) for number in range(len(reducer.records))]


def _place(reducer: EncoderReducer, number: int) -> LocationStatus:
    record, found, config = reducer.records[number], reducer.found, reducer.config
    locations = config.locations
    if reducer.through_decoder:
        restored = "after the decoder"
    elif reducer.restore_location < len(found.layers):
        restored = f"after layer {reducer.restore_location}"
    else:
        restored = "after the last layer"
    if number + 1 < len(locations):
        restored = f"reduced again at {locations[number + 1]}"
    full = reduced = None
    if (first := reducer.records[0].last_tokens) is not None and record.last_clusters_count is not None:
        full, reduced = (_flops(reducer, number, first, count) for count in (first, record.last_clusters_count))
    where = type(found.encoder).__name__
    return record.location_status(where, locations[number], f"{restored} ({config.restore})", full, reduced)


def _flops(reducer: EncoderReducer, number: int, num_tokens: int, num_clusters: int) -> float:
    """FLOPs for one image from a location to the next; those of layers on all tokens count at the first."""
    found, last = reducer.found, reducer.restore_location
    around = found.prefix + found.suffix
    bounds = [*reducer.config.locations, last]
    total = layers_flops(found.layers[bounds[number] : bounds[number + 1]], num_clusters + around)
    if number == 0:
        total += layers_flops([*found.layers[: bounds[0]], *found.layers[last:]], num_tokens + around)
    if number == len(bounds) - 2:
        in_decoder = num_clusters if reducer.through_decoder else num_tokens
        total += layers_flops(found.decoder_layers, in_decoder + found.decoder_suffix)
    return total
