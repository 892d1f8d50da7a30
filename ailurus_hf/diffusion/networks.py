"""Which networks can be reduced, one declaration each; `register_network` adds more.

register_network(DiffusionNetwork(MyTransformer, blocks=("layers",)))
"""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from ..errors import UnsupportedModelError
from .backend import modules_of
from .declaration import DiffusionNetwork, OwnProcessor
from .declarations import DECLARATIONS
from .refused import REFUSED

__all__ = [
    "DiffusionNetwork",
    "OwnProcessor",
    "declaration_of",
    "find_networks",
    "parts_left_whole",
    "reason_against",
    "register_network",
]

_DECLARED: dict[type, DiffusionNetwork] = {declared.network: declared for declared in DECLARATIONS}


def register_network(declaration: DiffusionNetwork) -> DiffusionNetwork:
    """Has `apply_ailurus` reduce networks of a class.

    Args:
        declaration: replaces an earlier one of the same class.

    Returns:
        The declaration.

    Example:
        register_network(DiffusionNetwork(MyTransformer, blocks=("layers",)))
    """
    _DECLARED[declaration.network] = declaration
    return declaration


# Parts of pipelines that are in the UNet, too.
IN_THE_UNET = ("MotionAdapter", "ControlNetXSAdapter")


def declaration_of(module: nn.Module) -> DiffusionNetwork | None:
    """The declaration of a module's class, or of the nearest class it derives from; None where there is none, or where
    that class is refused."""
    for base in type(module).__mro__:
        if base in _DECLARED:
            return _DECLARED[base]
        if base.__name__ in REFUSED:
            return None
    return None


def reason_against(module: nn.Module) -> str | None:
    """Why a network is refused, by its class; None where nothing is known against it."""
    return next((REFUSED[base.__name__] for base in type(module).__mro__ if base.__name__ in REFUSED), None)


def parts_left_whole(target: Any) -> list[tuple[str, nn.Module]]:
    """The parts of a pipeline that have attention over latents and no declaration, such as some ControlNets."""
    if not isinstance(target, DiffusionPipeline):
        return []
    return [found for name, part in modules_of(target) for found in _undeclared(name, part)]


def _undeclared(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    if declaration_of(module) is not None or not hasattr(module, "register_to_config"):
        return []
    if any(declaration_of(part) is not None for part in module.modules()):
        # A list of ControlNets.
        children = ((f"{name}.{path}", part) for path, part in module.named_modules() if path)
        return [found for path, part in children for found in _undeclared(path, part)]
    kind = f"{type(module).__module__}.{type(module).__name__}"
    if ".autoencoders." in kind or kind.endswith(IN_THE_UNET):
        return []
    return [(name, module)] if any(hasattr(part, "set_processor") for part in module.modules()) else []


def find_networks(target: Any) -> list[nn.Module]:
    """Every declared network in a pipeline or module, each once; raises UnsupportedModelError where there is none."""
    parts = [module for _, part in modules_of(target) for module in part.modules()]
    networks = {id(module): module for module in parts if declaration_of(module) is not None}
    if networks:
        return list(networks.values())
    supported = ", ".join(sorted(network.__name__ for network in _DECLARED))
    for module in parts:
        if (reason := reason_against(module)) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} is not supported: {reason}. Supported networks: {supported}"
            )
    raise UnsupportedModelError(
        f"{type(target).__name__} holds no network whose tokens can be reduced. Supported networks: {supported}"
    )
