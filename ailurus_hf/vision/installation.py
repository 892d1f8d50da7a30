"""Installation: one `apply_ailurus` on a transformers model, remembered on its encoders so that it can be undone."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..analysis import layers_flops
from ..clustering import Clustering, configured, configured_nesting
from ..config import AiluRusConfig
from ..status import Place, Status
from .finding import find_encoders
from .reducer import EncoderReducer

# The attribute on an encoder that holds its reducer; gone again after `uninstall`.
ATTRIBUTE = "_ailurus_reducer"
CONFIG_KEY = "ailurus_config"


def install(target: nn.Module, config: AiluRusConfig, clustering: Clustering | None = None) -> None:
    """Reduces every supported encoder in `target`; replaces what was on. On an error all is as it was before.

    clustering: another way to cluster than the config's, to compare with.
    """
    cluster = clustering or configured(config)
    reducers = [EncoderReducer(found, config, cluster, configured_nesting(config)) for found in find_encoders(target)]
    uninstall(target)
    for reducer in reducers:
        reducer.install()
        setattr(reducer.found.encoder, ATTRIBUTE, reducer)
    if hasattr(target, "config"):
        # Written into config.json by save_pretrained; from_pretrained of the AiluRus classes reads it.
        setattr(target.config, CONFIG_KEY, config.to_dict())


def uninstall(target: nn.Module) -> None:
    """Takes every reduction off `target` and its parts; nothing to do is no error."""
    for reducer in reducers_of(target):
        reducer.remove()
        delattr(reducer.found.encoder, ATTRIBUTE)
    for module in target.modules():
        if CONFIG_KEY in vars(getattr(module, "config", None) or object):
            delattr(module.config, CONFIG_KEY)


def reducers_of(target: nn.Module) -> list[EncoderReducer]:
    """The reducers on `target` and its parts, in order."""
    return [vars(module)[ATTRIBUTE] for module in target.modules() if ATTRIBUTE in vars(module)]


def status(target: nn.Module) -> Status:
    """What is on in `target`, and what its last forward did."""
    reducers = reducers_of(target)
    name = type(target).__name__
    if not reducers:
        return Status(name)
    last = next((r for r in reversed(reducers[-1].records) if r.last_clusters is not None), reducers[-1].records[-1])
    return Status(
        name,
        reducers[0].config.to_dict(),
        [_place(reducer, number) for reducer in reducers for number in range(len(reducer.records))],
        last.last_clusters,
        last.last_grid,
    )


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
    return Place(
        where=type(found.encoder).__name__,
        location=locations[number],
        restored=f"{restored} ({config.restore})",
        num_tokens=record.last_tokens,
        num_clusters=record.last_clusters_count,
        forwards=record.forwards,
        clusterings=record.clusterings,
        flops=full,
        reduced_flops=reduced,
    )


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


def saved_config(config: Any) -> AiluRusConfig | None:
    """The AiluRusConfig that a model's config.json carries, if any."""
    fields = getattr(config, CONFIG_KEY, None)
    return None if fields is None else AiluRusConfig.from_dict(fields)
