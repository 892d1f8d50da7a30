"""Installation: one `apply_ailurus` on a pipeline or network, remembered on its networks so that it can be undone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from ..clustering import ClusterFunction, get_clustering
from ..config import AiluRusDiffusionConfig
from ..errors import AiluRusError
from .networks import declaration_of, find_networks
from .reducer import ATTRIBUTE, NetworkReducer, reducers_of
from .status import status
from .transformer import TransformerReducer
from .unet import UNetReducer

__all__ = ["denoising", "install", "reducers_of", "status", "uninstall"]


def install(target: Any, config: AiluRusDiffusionConfig, clustering: ClusterFunction | None = None) -> None:
    """Reduces every supported network in `target`; replaces what was on. On an error all is as it was before.

    Args:
        target: a diffusers pipeline or network.
        config: the settings.
        clustering: another way to cluster than the config's, to compare with.
    """
    if config.unreduced_last_steps and isinstance(target, nn.Module):
        raise AiluRusError(
            f"unreduced_last_steps={config.unreduced_last_steps} needs a pipeline, which knows how many steps there "
            f"are: apply it to the pipeline, got {type(target).__name__}"
        )
    cluster = partial(get_clustering(clustering or config.clustering), check_finite=config.check_finite)
    reducers = [_reducer(network, config, cluster) for network in find_networks(target)]
    uninstall(target)
    for reducer in reducers:
        reducer.install()
        setattr(reducer.network, ATTRIBUTE, reducer)


def _reducer(network: nn.Module, config: AiluRusDiffusionConfig, clustering: ClusterFunction) -> NetworkReducer:
    declared = declaration_of(network)
    assert declared is not None
    kind = UNetReducer if declared.layout == "maps" else TransformerReducer
    return kind(network, declared, config, clustering)


def uninstall(target: Any) -> None:
    """Takes every reduction off `target` and its parts; nothing to do is no error."""
    for _, reducer in reducers_of(target):
        reducer.remove()
        delattr(reducer.network, ATTRIBUTE)


@contextmanager
def denoising(target: Any, scheduler: Any = None) -> Iterator[None]:
    """Says that all calls of this thread within the block are of one picture, or one batch of them.

    For loops of one's own with `refresh_every`, `unreduced_first_steps` or `unreduced_last_steps`; a pipeline of
    diffusers needs no such block.

    Args:
        target: what `apply_ailurus` was called with, or a network of it.
        scheduler: the one whose timesteps the network is called with; None: another timestep is another step.

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
