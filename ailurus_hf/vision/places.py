"""What an encoder's last forward did at each location: tokens, clusters, and FLOPs by the layers' sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..analysis import layers_flops
from ..status import Place

if TYPE_CHECKING:
    from .reducer import EncoderReducer


def encoder_places(reducer: EncoderReducer) -> list[Place]:
    """One Place a location."""
    return [_place(reducer, number) for number in range(len(reducer.records))]


def _place(reducer: EncoderReducer, number: int) -> Place:
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
    first = reducer.records[0].last_tokens
    counts = [record.last_clusters_count for record in reducer.records]
    full = reduced = None
    if first is not None and None not in counts:
        full, reduced = (_flops(reducer, first, each) for each in ([first] * len(counts), counts))
    where = type(found.encoder).__name__
    return record.place(where, locations[number], f"{restored} ({config.restore})", full, reduced)


def _flops(reducer: EncoderReducer, num_tokens: int, counts: list[Any]) -> float:
    """FLOPs of all layers for one image: N tokens up to the first location, then M of each to the next."""
    found, last = reducer.found, reducer.restore_location
    around = found.prefix + found.suffix
    bounds = [*reducer.config.locations, last]
    total = layers_flops([*found.layers[: bounds[0]], *found.layers[last:]], num_tokens + around)
    for start, end, count in zip(bounds, bounds[1:], counts, strict=False):
        total += layers_flops(found.layers[start:end], count + around)
    in_decoder = counts[-1] if reducer.through_decoder else num_tokens
    return total + layers_flops(found.decoder_layers, in_decoder + found.decoder_suffix)
