"""Token reduction in diffusers' UNets, ControlNets and transformers. Names load when first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..extras import needs_extra
from ..versions import check_versions

check_versions("torch", "diffusers", "transformers", "accelerate")

_HOME = {
    "AiluRusProcessor": "processor",
    "DiffusionNetwork": "declaration",
    "IMAGE_FIRST": "token_order",
    "IMAGE_ONLY": "token_order",
    "OwnProcessor": "declaration",
    "TEXT_FIRST": "token_order",
    "TokenOrder": "token_order",
    "denoising": "apply",
    "register_network": "networks",
}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from .apply import denoising as denoising
    from .declaration import DiffusionNetwork as DiffusionNetwork
    from .declaration import OwnProcessor as OwnProcessor
    from .networks import register_network as register_network
    from .processor import AiluRusProcessor as AiluRusProcessor
    from .token_order import IMAGE_FIRST as IMAGE_FIRST
    from .token_order import IMAGE_ONLY as IMAGE_ONLY
    from .token_order import TEXT_FIRST as TEXT_FIRST
    from .token_order import TokenOrder as TokenOrder


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needs_extra("diffusion", name):
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
