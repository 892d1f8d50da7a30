"""A model or pipeline that is measured, and left as it was: modes, schedulers and bars."""

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
        target: a transformers model or a diffusers pipeline.
    """
    with _model(target) if isinstance(target, nn.Module) else _pipeline(target):
        yield


@contextmanager
def _model(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _pipeline(pipeline: Any) -> Iterator[None]:
    own = vars(pipeline)
    bars = own.get("_progress_bar_config")
    # A call sets a scheduler's timesteps.
    schedulers = {name: part for name, part in own.items() if hasattr(part, "timesteps") and hasattr(part, "step")}
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
