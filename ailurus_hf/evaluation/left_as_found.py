"""A model or pipeline that is measured, and left as it was: modes, settings of its configs, schedulers and bars."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def left_as_found(target: Any) -> Iterator[None]:
    """For the block a model predicts (`eval()`) and a pipeline shows no bars; after it, all is as before.

    Args:
        target: a transformers model or a diffusers pipeline, which the block reduces and switches off again. Settings
            that it was loaded with, and that are not on, would be gone then.
    """
    with _model(target) if isinstance(target, nn.Module) else _pipeline(target):
        yield


@contextmanager
def _model(model: nn.Module) -> Iterator[None]:
    from ..vision.saved_settings import kept_settings

    modes = [(module, module.training) for module in model.modules()]
    with kept_settings(model):
        try:
            model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def _pipeline(pipeline: Any) -> Iterator[None]:
    from ..diffusion.saved import kept_settings

    own = vars(pipeline)
    bars = own.get("_progress_bar_config")
    # A call sets a scheduler's timesteps.
    schedulers = {name: part for name, part in own.items() if hasattr(part, "timesteps") and hasattr(part, "step")}
    with kept_settings(pipeline):
        try:
            pipeline.set_progress_bar_config(**{**(bars or {}), "disable": True})
            for name, scheduler in schedulers.items():
                setattr(pipeline, name, copy.deepcopy(scheduler))
            yield
        finally:
            for name, scheduler in schedulers.items():
                setattr(pipeline, name, scheduler)
            if bars is None:
                own.pop("_progress_bar_config", None)
            else:
                pipeline._progress_bar_config = bars
