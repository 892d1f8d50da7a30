"""Diffusers pipelines, one folder each. Names load when first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..extras import needs_extra

_HOME = {"ControlVideoPipeline": "controlvideo", "ControlVideoPipelineOutput": "controlvideo"}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from .controlvideo import ControlVideoPipeline as ControlVideoPipeline
    from .controlvideo import ControlVideoPipelineOutput as ControlVideoPipelineOutput


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needs_extra("video", name):
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
