"""Installation: one `apply_ailurus` on a transformers model, remembered on its encoders so that it can be undone."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from ..clustering import ClusterFunction, get_clustering
from ..clustering.budget import by_content
from ..config import AiluRusConfig
from ..errors import AiluRusError
from ..status import Status
from .discovery import find_encoders
from .encoder import EncoderReducer
from .stages import StageReducer, stage_reducers
from .windows import GlobalLayerReducer, global_layer_reducers

Reducer = EncoderReducer | StageReducer | GlobalLayerReducer

# The attribute on an encoder or a stage that holds its reducer; gone again after `uninstall`.
ATTRIBUTE = "_ailurus_reducer"
CONFIG_KEY = "ailurus_config"


def install(target: nn.Module, config: AiluRusConfig, clustering: ClusterFunction | None = None) -> None:
    """Reduces every supported encoder in `target`, or SegFormer's stages; replaces what was on. On an error all is as it was before.

    clustering: another way to cluster than the config's, to compare with.
    """
    chosen = get_clustering(clustering or config.clustering)
    if config.min_keep_ratio is not None:
        chosen = by_content(chosen, config.min_keep_ratio)
    cluster = partial(chosen, check_finite=config.check_finite)
    reducers: list[Reducer] = [*stage_reducers(target, config, cluster)]
    if not reducers and config.stages is None:
        reducers += global_layer_reducers(target, config, cluster)
    if not reducers:
        encoders = find_encoders(target)
        if config.stages is not None:
            raise AiluRusError(
                f"{type(target).__name__} has no stages to choose from: leave stages out, got stages={config.stages}"
            )
        reducers = [EncoderReducer(found, config, cluster, chosen.join) for found in encoders]
    uninstall(target)
    for reducer in reducers:
        reducer.install()
        setattr(reducer.module, ATTRIBUTE, reducer)
    if hasattr(target, "config"):
        # Written into config.json by save_pretrained; from_pretrained of the AiluRus classes reads it.
        setattr(target.config, CONFIG_KEY, config.to_dict())


def uninstall(target: nn.Module) -> None:
    """Takes every reduction off `target` and its parts; nothing to do is no error."""
    for reducer in reducers_of(target):
        reducer.remove()
        delattr(reducer.module, ATTRIBUTE)
    for module in target.modules():
        if CONFIG_KEY in vars(getattr(module, "config", None) or object):
            delattr(module.config, CONFIG_KEY)


def reducers_of(target: nn.Module) -> list[Reducer]:
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
        [place for reducer in reducers for place in reducer.locations()],
        last.last_clusters,
        last.last_grid,
    )


def saved_config(config: Any) -> AiluRusConfig | None:
    """The AiluRusConfig that a model's config.json carries, if any."""
    fields = getattr(config, CONFIG_KEY, None)
    return None if fields is None else AiluRusConfig.from_dict(fields)
