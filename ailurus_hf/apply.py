"""The three verbs: apply_ailurus switches token reduction on, remove_ailurus off, ailurus_status says what it does."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar, overload

from torch import nn

from .config import AiluRusConfig, AiluRusDiffusionConfig, from_fields
from .config_base import read_config
from .errors import AiluRusError, UnsupportedModelError
from .extras import needs_extra
from .presets import HALF, PRESET_OF_CLASS
from .status import Status

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .fields import AiluRusDiffusionFields, AiluRusFields

Target = TypeVar("Target")
Config = AiluRusConfig | AiluRusDiffusionConfig
ConfigOrFile = Config | str | Path

logger = logging.getLogger(__name__)


@overload
def apply_ailurus(
    target: Target, config: AiluRusConfig | str | Path | None = None, **config_fields: Unpack[AiluRusFields]
) -> Target: ...


@overload
def apply_ailurus(
    target: Target,
    config: AiluRusDiffusionConfig | str | Path | None = None,
    **config_fields: Unpack[AiluRusDiffusionFields],
) -> Target: ...


def apply_ailurus(target: Target, config: ConfigOrFile | None = None, **config_fields: Any) -> Target:
    """Switches token reduction on: later layers run on representative tokens instead of all. No weights change.

    Args:
        target: a transformers model, or an encoder inside one; a diffusers pipeline, or a UNet, ControlNet or PixArt,
            SD3, Flux or Wan transformer. It is changed in place; to apply again replaces.
        config: an `AiluRusConfig`, for diffusers an `AiluRusDiffusionConfig`, or a file of one, as `config.save` and
            `autotune(...).save` write. Without one, and without fields, the settings that the model, or the networks of
            the pipeline, were saved with; else, for a model, a preset by what its class is for ("dense",
            "classification"), or half of the tokens after layer 2; for diffusers the config's defaults. A log line
            (INFO) says which.
        config_fields: fields of the config, which win over those of `config`.

    Returns:
        The target.

    Raises:
        UnsupportedModelError: nothing in the target can be reduced.
        AiluRusError: the settings are wrong, or another thread is in the middle of a forward. The target is then as it
            was.

    Example:
        model = AutoModelForImageClassification.from_pretrained("google/vit-base-patch16-224")
        apply_ailurus(model, cluster_location=2, keep_ratio=0.5)

        pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        apply_ailurus(pipe, keep_ratio=0.25)
    """
    installation = _installation(target)
    kind: type[Any] = AiluRusDiffusionConfig if _is_diffusers(target) else AiluRusConfig
    chosen: Config | None = read_config(kind, config) if isinstance(config, str | Path) else config
    if chosen is None and not config_fields:
        if kind is AiluRusConfig:
            chosen = installation.saved_config(target) or _default_config(target)
        elif installation.install_saved(target):
            return target
        else:
            logger.info("%s: AiluRusDiffusionConfig with its defaults", type(target).__name__)
    installation.install(target, _combined(kind, chosen, config_fields))
    return target


def remove_ailurus(target: Target) -> Target:
    """Switches token reduction off.

    Outputs are bit for bit those from before, and no hook, attribute or setting is left. From a copy of a model it
    removes what is on the copy.

    Args:
        target: as for `apply_ailurus`; where nothing is on, nothing happens.

    Returns:
        The target.

    Raises:
        AiluRusError: another thread is in the middle of a forward.

    Example:
        remove_ailurus(model)
    """
    _installation(target).uninstall(target)
    return target


@contextmanager
def ailurus_enabled(target: Target, config: ConfigOrFile | None = None, **config_fields: Any) -> Iterator[Target]:
    """Switches token reduction on for a `with` block and off after it, also when the block raises.

    Args:
        target: as for `apply_ailurus`, with nothing on: the block leaves it as it came.
        config, config_fields: as for `apply_ailurus`; with neither, the block runs with the target as it is.

    Yields:
        The target.

    Raises:
        AiluRusError: AiluRus is on already, or the settings are wrong.

    Example:
        with ailurus_enabled(model, cluster_location=2, keep_ratio=0.5):
            logits = model(**inputs).logits
    """
    if config is None and not config_fields:
        yield target
        return
    if ailurus_status(target).active:
        raise AiluRusError(
            f"AiluRus is on in {type(target).__name__}, and would be off after the block: call remove_ailurus "
            "first, or apply_ailurus to replace its settings"
        )
    with _installation(target).kept_settings(target):
        apply_ailurus(target, config, **config_fields)
        try:
            yield target
        finally:
            remove_ailurus(target)


def ailurus_status(target: Any) -> Status:
    """What is on and what the last forward did.

    Args:
        target: as for `apply_ailurus`.

    Returns:
        A `Status`, which prints as a table: where tokens are reduced, from how many to how many, how often they were
        clustered, and the FLOPs saved. Its `to_dict()` is JSON.

    Example:
        status = ailurus_status(model)
        print(status)  # the table
        status.locations[0].num_clusters  # M of the last forward
    """
    status: Status = _installation(target).status(target)
    return status


def _combined(kind: type[Config], config: Config | None, fields: dict[str, Any]) -> Config:
    if config is not None and not isinstance(config, kind):
        raise AiluRusError(f"config must be an {kind.__name__}, got {type(config).__name__}")
    given = {} if config is None else config.to_dict()
    # num_clusters and keep_ratio exclude each other: a new one replaces the other.
    for one, other in (("num_clusters", "keep_ratio"), ("keep_ratio", "num_clusters")):
        if one in fields and other not in fields:
            given.pop(other, None)
    return from_fields(kind, {**given, **fields})


def _default_config(target: Any) -> AiluRusConfig:
    """The preset for what a model's class is for, named in a log line."""
    name = type(target).__name__
    preset = next((preset for ending, preset in PRESET_OF_CLASS.items() if name.endswith(ending)), None)
    config = AiluRusConfig(**HALF) if preset is None else AiluRusConfig.preset(preset)
    logger.info("%s: %s, %s", name, "no preset is for it" if preset is None else f"preset {preset!r}", config)
    return config


def _is_diffusers(target: Any) -> bool:
    """Whether a target, or a part of it, is of a class that diffusers defines; this does not import diffusers."""
    parts = target.modules() if isinstance(target, nn.Module) else [target]
    return any(base.__module__.startswith("diffusers.") for part in parts for base in type(part).__mro__)


def _installation(target: Any) -> ModuleType:
    """What installs on the target's kind: transformers models or diffusers pipelines and networks."""
    diffusers = _is_diffusers(target)
    if not diffusers and not isinstance(target, nn.Module):
        raise UnsupportedModelError(
            f"{type(target).__name__} is no torch module: give a transformers model, or a diffusers pipeline or network"
        )
    with needs_extra("diffusion" if diffusers else "vision", f"apply_ailurus to {type(target).__name__}"):
        if diffusers:
            from .diffusion import apply as backend
        else:
            from .vision import apply as backend  # type: ignore[no-redef]
    return backend
