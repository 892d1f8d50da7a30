"""Installation: one `apply_ailurus` on a transformers model, remembered on its modules so that it can be undone."""

from __future__ import annotations

from functools import partial

from torch import nn

from ..clustering import ClusterFunction
from ..clustering.budget import by_content
from ..clustering.compiled import clustering_of
from ..config import AiluRusConfig
from ..status import Status
from .base import Reducer
from .encoder import EncoderReducer
from .saved_settings import SavedSettings, clear_settings, kept_settings, saved_config, saved_fields
from .stages import StageReducer
from .windows import GlobalLayerReducer

__all__ = ["install", "kept_settings", "reducers_of", "saved_config", "status", "uninstall"]

# Tried in this order. The last one raises where there is nothing that it can reduce.
REDUCERS: tuple[type[Reducer], ...] = (StageReducer, GlobalLayerReducer, EncoderReducer)

# The attribute on a module that holds its reducer; gone again after `uninstall`.
ATTRIBUTE = "_ailurus_reducer"


def install(target: nn.Module, config: AiluRusConfig, clustering: ClusterFunction | None = None) -> None:
    """Reduces every supported encoder in a model, or SegFormer's stages; replaces what was on.

    Args:
        target: the model. On an error it is as it was before.
        config: the settings.
        clustering: another way to cluster than the config's, to compare with.

    Raises:
        UnsupportedModelError: nothing in the model can be reduced.
        AiluRusError: the settings do not fit the model, or another thread is in the middle of a forward.
    """
    chosen = clustering_of(config, clustering)
    if config.min_keep_ratio is not None:
        chosen = by_content(chosen, config.min_keep_ratio)
    cluster = partial(chosen, check_finite=config.check_finite)
    reducers: list[Reducer] = []
    for kind in REDUCERS:
        if reducers := list(kind.find(target, config, cluster, chosen.join)):
            break
    uninstall(target)
    settings = SavedSettings(target, [reducer.module for reducer in reducers], config.to_dict())
    for reducer in reducers:
        reducer.install()
        settings.write_for(reducer.module, reducer.hooks)
        setattr(reducer.module, ATTRIBUTE, reducer)


def uninstall(target: nn.Module) -> None:
    """Takes every reduction off `target` and its parts; nothing to do is no error."""
    reducers = reducers_of(target)
    for reducer in reducers:
        reducer.check_idle()
    for reducer in reducers:
        reducer.remove()
        delattr(reducer.module, ATTRIBUTE)
    clear_settings(target)


def reducers_of(target: nn.Module) -> list[Reducer]:
    """The reducers on `target` and its parts, in order."""
    return [vars(module)[ATTRIBUTE] for module in target.modules() if ATTRIBUTE in vars(module)]


def status(target: nn.Module) -> Status:
    """What is on in `target`, and what its last forward did."""
    reducers = reducers_of(target)
    name = type(target).__name__
    if not reducers:
        return Status(name, settings_are_off=saved_fields(target) is not None)
    last = next((r for r in reversed(reducers[-1].records) if r.last_clusters is not None), reducers[-1].records[-1])
    return Status(
        name,
        reducers[0].config.to_dict(),
        [row for reducer in reducers for row in reducer.status()],
        last.last_clusters,
        last.last_grid,
    )
