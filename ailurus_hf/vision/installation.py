"""Installation: one `apply_ailurus` on a transformers model, remembered on its encoders so that it can be undone."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..analysis import layers_flops
from ..clustering import Clustering, configured
from ..config import AiluRusConfig
from ..status import Place, Status
from .families import find_encoders
from .reducer import EncoderReducer

# The attribute on an encoder that holds its reducer; gone again after `uninstall`.
ATTRIBUTE = "_ailurus_reducer"
CONFIG_KEY = "ailurus_config"


def install(target: nn.Module, config: AiluRusConfig, clustering: Clustering | None = None) -> None:
    """Reduces every supported encoder in `target`; replaces what was on. On an error all is as it was before.

    clustering: another way to cluster than the config's, to compare with.
    """
    reducers = [EncoderReducer(found, config, clustering or configured(config)) for found in find_encoders(target)]
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
    last = reducers[-1].record
    return Status(
        name,
        reducers[0].config.to_dict(),
        [_place(reducer) for reducer in reducers],
        last.last_clusters,
        last.last_grid,
    )


def _place(reducer: EncoderReducer) -> Place:
    record, found, config = reducer.record, reducer.found, reducer.config
    restored = "after the last layer"
    if reducer.through_decoder:
        restored = "after the decoder"
    elif reducer.restore_location < len(found.layers):
        restored = f"after layer {reducer.restore_location}"
    full = reduced = None
    if record.last_tokens is not None and record.last_clusters_count is not None:
        full = _flops(reducer, record.last_tokens, record.last_tokens)
        reduced = _flops(reducer, record.last_tokens, record.last_clusters_count)
    return Place(
        where=type(found.encoder).__name__,
        location=config.cluster_location,
        restored=f"{restored} ({config.restore})",
        num_tokens=record.last_tokens,
        num_clusters=record.last_clusters_count,
        forwards=record.forwards,
        clusterings=record.clusterings,
        flops=full,
        reduced_flops=reduced,
    )


def _flops(reducer: EncoderReducer, num_tokens: int, num_clusters: int) -> float:
    found, first, last = reducer.found, reducer.config.cluster_location, reducer.restore_location
    prefix, suffix = found.prefix, found.decoder_suffix
    full = layers_flops([*found.layers[:first], *found.layers[last:]], num_tokens + prefix)
    reduced = layers_flops(found.layers[first:last], num_clusters + prefix)
    in_decoder = num_clusters if reducer.through_decoder else num_tokens
    return full + reduced + layers_flops(found.decoder_layers, in_decoder + suffix)


def saved_config(config: Any) -> AiluRusConfig | None:
    """The AiluRusConfig that a model's config.json carries, if any."""
    fields = getattr(config, CONFIG_KEY, None)
    return None if fields is None else AiluRusConfig.from_dict(fields)
