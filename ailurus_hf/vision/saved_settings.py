"""Settings in a model's config: `save_pretrained` writes them to config.json, `apply_ailurus(model)` reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from ..config import AiluRusConfig
from ..hooks import Hooks

CONFIG_KEY = "ailurus_config"


class SavedSettings:
    """The settings of one `apply_ailurus`, in the configs of the model, of what wraps it or is inside it.

    They are in the config of the outermost model, and in that of each reduced part: a tower may be saved, or switched
    off, by itself. When a part is switched off they go from all configs but those of parts that are still on.
    """

    def __init__(self, target: nn.Module, reduced: Sequence[nn.Module], settings: dict[str, Any]) -> None:
        self.settings = settings
        self.outermost = list(_outermost_configs(target))
        self.own = {id(module): _config_around(target, module) for module in reduced}
        self.on: list[PreTrainedConfig] = []

    def write_for(self, module: nn.Module, hooks: Hooks) -> None:
        """Writes the settings for a reduced module, until its hooks are removed."""
        own = self.own[id(module)]
        for config in (*self.outermost, *own):
            setattr(config, CONFIG_KEY, dict(self.settings))
        self.on += own
        hooks.on_removal(partial(self.drop, own))

    def drop(self, own: list[PreTrainedConfig]) -> None:
        """A part is off, whose configs are `own`."""
        for config in own:
            index = next(i for i, each in enumerate(self.on) if each is config)
            del self.on[index]
        for config in (*self.outermost, *own):
            if not any(config is other for other in self.on):
                vars(config).pop(CONFIG_KEY, None)


def clear_settings(target: nn.Module) -> None:
    """Removes settings from all configs in a model, also if nothing was on: saved or copied configs have them."""
    for module in target.modules():
        for config in _with_parts(getattr(module, "config", None)):
            vars(config).pop(CONFIG_KEY, None)


def saved_config(source: Any) -> AiluRusConfig | None:
    """The AiluRusConfig that a model or a config carries, if any; one at the top comes before one of a part."""
    found = saved_fields(source)
    return None if found is None else AiluRusConfig.from_dict(found)


def saved_fields(source: Any) -> dict[str, Any] | None:
    """The same as it was saved, which may be of no use here."""
    configs = list(_outermost_configs(source)) if isinstance(source, nn.Module) else [source]
    parts = (each for config in configs for each in _with_parts(config))
    return next((vars(each)[CONFIG_KEY] for each in parts if CONFIG_KEY in vars(each)), None)


def _outermost_configs(target: nn.Module) -> Iterator[PreTrainedConfig]:
    """The config of a model, or of each model that it wraps."""
    if isinstance(config := getattr(target, "config", None), PreTrainedConfig):
        yield config
        return
    for child in target.children():
        yield from _outermost_configs(child)


def _config_around(target: nn.Module, module: nn.Module) -> list[PreTrainedConfig]:
    """The config of a module, or of the innermost module around it that has one."""
    around = [m for m in target.modules() if any(module is inner for inner in m.modules())]
    configs = [config for m in around if isinstance(config := vars(m).get("config"), PreTrainedConfig)]
    return configs[-1:]


def _with_parts(config: Any) -> Iterator[PreTrainedConfig]:
    """A config and those inside it, as of towers and backbones."""
    if not isinstance(config, PreTrainedConfig):
        return
    yield config
    for part in vars(config).values():
        yield from _with_parts(part)


@contextmanager
def kept_settings(target: nn.Module) -> Iterator[None]:
    """After the block, settings that configs had before stand there again: switching off clears them."""
    before = [
        (config, vars(config)[CONFIG_KEY])
        for module in target.modules()
        for config in _with_parts(getattr(module, "config", None))
        if CONFIG_KEY in vars(config)
    ]
    try:
        yield
    finally:
        for config, settings in before:
            setattr(config, CONFIG_KEY, settings)
