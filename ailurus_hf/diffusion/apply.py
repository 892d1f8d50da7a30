"""Installation: one `apply_ailurus` on a pipeline or network, remembered on its networks so that it can be undone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from ..clustering import ClusterFunction
from ..clustering.compiled import clustering_of
from ..config import AiluRusDiffusionConfig
from ..errors import AiluRusError
from .backend import modules_of
from .networks import declaration_of, find_networks, parts_left_whole, reason_against
from .reducer import ATTRIBUTE, NetworkReducer, reducers_of
from .saved import clear_settings, kept_settings, saved_settings, write_settings
from .status import status
from .transformer import TransformerReducer
from .unet import UNetReducer

log = logging.getLogger(__name__)

__all__ = ["denoising", "install", "install_saved", "kept_settings", "reducers_of", "status", "uninstall"]


def install(target: Any, config: AiluRusDiffusionConfig, clustering: ClusterFunction | None = None) -> None:
    """Reduces every supported network in `target`; replaces what was on. On an error all is as it was before.

    Args:
        target: a diffusers pipeline or network.
        config: the settings.
        clustering: another way to cluster than the config's, to compare with.
    """
    for name in ("unreduced_last_steps", "step_factors"):
        if (value := getattr(config, name)) and isinstance(target, nn.Module):
            raise AiluRusError(
                f"{name}={value} needs a pipeline, which knows how many steps there are: apply it to the pipeline, got "
                f"{type(target).__name__}"
            )
    _install(target, dict.fromkeys(find_networks(target), config), clustering)


def install_saved(target: Any) -> bool:
    """Reduces the networks whose config has settings, each by its own; whether there was any."""
    saved = {network: saved_settings(network) for network in find_networks(target)}
    settings = {network: config for network, config in saved.items() if config is not None}
    if settings:
        _install(target, settings)
    return bool(settings)


def _install(
    target: Any, settings: dict[nn.Module, AiluRusDiffusionConfig], clustering: ClusterFunction | None = None
) -> None:
    _refuse_in_forward(target)
    reducers = [_reducer(network, config, clustering) for network, config in settings.items()]
    uninstall(target)
    for reducer in reducers:
        reducer.install()
        setattr(reducer.network, ATTRIBUTE, reducer)
        write_settings(reducer.network, reducer.config)
    for name, part in parts_left_whole(target):
        reason = reason_against(part)
        log.warning(
            "%s is left whole: a %s is no network that AiluRus can reduce%s",
            name,
            type(part).__name__,
            "" if reason is None else f", as {reason}",
        )


def _reducer(network: nn.Module, config: AiluRusDiffusionConfig, clustering: ClusterFunction | None) -> NetworkReducer:
    declared = declaration_of(network)
    assert declared is not None
    kind = UNetReducer if declared.layout == "maps" else TransformerReducer
    chosen = clustering_of(config, clustering)
    return kind(network, declared, config, partial(chosen, check_finite=config.check_finite))


def _refuse_in_forward(target: Any) -> None:
    for _, reducer in reducers_of(target):
        if reducer.is_in_forward():
            raise AiluRusError(
                f"{type(reducer.network).__name__} is in a forward: switch AiluRus on and off between forwards"
            )


def uninstall(target: Any) -> None:
    """Takes every reduction off `target` and its parts; nothing to do is no error."""
    _refuse_in_forward(target)
    for _, reducer in reducers_of(target):
        reducer.remove()
        delattr(reducer.network, ATTRIBUTE)
    for _, part in modules_of(target):
        for module in part.modules():
            clear_settings(module)


@contextmanager
def denoising(target: Any, scheduler: Any = None) -> Iterator[None]:
    """Says that all calls of this thread within the block are of one picture, or one batch of them.

    For loops of one's own with `refresh_every` or `unreduced_first_steps` and, applied to a pipeline,
    `unreduced_last_steps`; a pipeline of diffusers that is called needs no such block.

    Args:
        target: what `apply_ailurus` was called with, or a network of it.
        scheduler: the one whose timesteps the network is called with; None: another timestep is another step.

    Yields:
        Nothing.

    Raises:
        AiluRusError: where AiluRus is not on.

    Example:
        with denoising(unet, scheduler):
            for timestep in scheduler.timesteps:
                noise = unet(latents, timestep, prompt).sample
                latents = scheduler.step(noise, timestep, latents).prev_sample
    """
    reducers = reducers_of(target)
    if not reducers:
        raise AiluRusError(f"AiluRus is not on in {type(target).__name__}: call apply_ailurus first")
    with ExitStack() as stack:
        for _, reducer in reducers:
            stack.enter_context(reducer.clock.generation(scheduler))
        yield
