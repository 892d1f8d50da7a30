"""Settings that travel with a network: in its config, which `save_pretrained` writes and `from_pretrained` reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..config import AiluRusDiffusionConfig
from .backend import modules_of

CONFIG_KEY = "ailurus_config"


def write_settings(network: nn.Module, config: AiluRusDiffusionConfig) -> None:
    """Writes the settings into the network's config. Where AiluRus is not used, diffusers keeps them and goes on."""
    fields = vars(network).get("_internal_dict")
    if fields is not None:
        _replace(network, {**fields, CONFIG_KEY: config.to_dict()})


def clear_settings(network: nn.Module) -> None:
    """Takes the settings out of the network's config."""
    fields = vars(network).get("_internal_dict")
    if fields is not None and CONFIG_KEY in fields:
        _replace(network, {name: value for name, value in fields.items() if name != CONFIG_KEY})


def saved_settings(network: nn.Module) -> AiluRusDiffusionConfig | None:
    """The settings in a network's config, None where there are none."""
    fields = saved_fields(network)
    return None if fields is None else AiluRusDiffusionConfig.from_dict(fields)


def saved_fields(network: nn.Module) -> dict[str, Any] | None:
    """The same as it was saved, which may be of no use here."""
    return (vars(network).get("_internal_dict") or {}).get(CONFIG_KEY)


@contextmanager
def kept_settings(target: Any) -> Iterator[None]:
    """After the block, settings that networks had before stand there again: switching off clears them."""
    networks = [module for _, part in modules_of(target) for module in part.modules()]
    before = [(each, saved_fields(each)) for each in networks]
    try:
        yield
    finally:
        for network, settings in before:
            if settings is not None:
                _replace(network, {**vars(network)["_internal_dict"], CONFIG_KEY: settings})


def _replace(network: nn.Module, fields: dict[str, Any]) -> None:
    owner: Any = network
    before = owner._internal_dict
    owner._internal_dict = type(before)(fields)
    # Loading an IP-Adapter writes to the config's attributes and not to its items, so those are not the same.
    vars(owner._internal_dict).update({name: value for name, value in vars(before).items() if name != CONFIG_KEY})
