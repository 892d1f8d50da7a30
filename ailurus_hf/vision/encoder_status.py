"""What an encoder's last forward did at each location: tokens, clusters, and FLOPs by the layers' sizes."""

from __future__ import annotations

from collections.abc import Sequence

from ..status import LocationStatus, Record
from .encoder_plan import EncoderPlan
from .flops import layers_flops


def encoder_status(plan: EncoderPlan, records: Sequence[Record]) -> list[LocationStatus]:
    """One row a location."""
    return [_row(plan, records, number) for number in range(len(records))]


def _row(plan: EncoderPlan, records: Sequence[Record], number: int) -> LocationStatus:
    record, locations = records[number], plan.config.locations
    if plan.through_decoder:
        restored = "after the decoder"
    elif plan.restore_location < plan.depth:
        restored = f"after layer {plan.restore_location}"
    else:
        restored = "after the last layer"
    if number + 1 < len(locations):
        restored = f"reduced again at {locations[number + 1]}"
    full = reduced = None
    if (first := records[0].last_tokens) is not None and record.last_clusters_count is not None:
        full, reduced = (_flops(plan, number, first, count) for count in (first, record.last_clusters_count))
    return record.location_status(plan.name, locations[number], f"{restored} ({plan.config.restore})", full, reduced)


def _flops(plan: EncoderPlan, number: int, num_tokens: int, num_clusters: int) -> float | None:
    """FLOPs for one image from a location to the next; those of layers on all tokens count at the first."""
    found, last = plan.found, plan.restore_location
    around = found.prefix + found.suffix
    bounds = [*plan.config.locations, last]
    parts = [layers_flops(found.layers[bounds[number] : bounds[number + 1]], num_clusters + around)]
    if number == 0:
        parts.append(layers_flops([*found.layers[: bounds[0]], *found.layers[last:]], num_tokens + around))
    if number == len(bounds) - 2:
        in_decoder = num_clusters if plan.through_decoder else num_tokens
        parts.append(layers_flops(found.decoder_layers, in_decoder + found.decoder_suffix))
    return None if None in parts else sum(part for part in parts if part is not None)
