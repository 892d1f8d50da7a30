"""The three verbs: apply_ailurus switches token reduction on, remove_ailurus off, ailurus_status says what it does."""

from __future__ import annotations

from types import ModuleType
from typing import Any, TypeVar

from torch import nn

from .config import AiluRusConfig
from .errors import AiluRusError, UnsupportedModelError
from .status import Status

Target = TypeVar("Target", bound=nn.Module)


def apply_ailurus(target: Target, config: AiluRusConfig | None = None, **config_fields: Any) -> Target:
    """Runs the later layers of a transformers model on M representative tokens instead of N. No weights change.

    target: a model, or an encoder inside one; it is changed in place and returned. Applying again replaces.
    config, config_fields: an `AiluRusConfig`, or its fields, or both (the fields win).
    Raises UnsupportedModelError where nothing in the target can be reduced, AiluRusError on wrong settings; the target
    is then as it was.

        model = AutoModelForImageClassification.from_pretrained("google/vit-base-patch16-224")
        apply_ailurus(model, cluster_location=2, keep_ratio=0.5)
    """
    _vision(target).install(target, _combined(config, config_fields))
    return target


def remove_ailurus(target: Target) -> Target:
    """Takes token reduction off: outputs are bit for bit those from before, and no hook or attribute is left."""
    _vision(target).uninstall(target)
    return target


def ailurus_status(target: nn.Module) -> Status:
    """What is on, where, N → M in the last forward, how often it clustered and the FLOPs saved; prints as a table."""
    status: Status = _vision(target).status(target)
    return status


def _combined(config: AiluRusConfig | None, fields: dict[str, Any]) -> AiluRusConfig:
    if config is not None and not isinstance(config, AiluRusConfig):
        raise AiluRusError(f"config must be an AiluRusConfig, got {type(config).__name__}")
    given = {} if config is None else config.to_dict()
    # num_clusters and keep_ratio exclude each other: a new one takes the other's place.
    for one, other in (("num_clusters", "keep_ratio"), ("keep_ratio", "num_clusters")):
        if one in fields and other not in fields:
            given.pop(other, None)
    try:
        return AiluRusConfig(**{**given, **fields})
    except TypeError as error:
        raise AiluRusError(f"{error}; the fields are {', '.join(AiluRusConfig.__dataclass_fields__)}") from None


def _vision(target: nn.Module) -> ModuleType:
    if not isinstance(target, nn.Module):
        raise UnsupportedModelError(f"{type(target).__name__} is no torch module: give a transformers model")
    try:
        from .vision import installation
    except ModuleNotFoundError as error:
        raise ImportError(f"{error}. Transformers models need: pip install 'ailurus-hf[vision]'") from error
    return installation
