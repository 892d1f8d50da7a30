"""Reducer: what every way to reduce a part of a model has in common, and what a new way has to write."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ..clustering import ClusterFunction
from ..clusters import TokenClusters
from ..config import AiluRusConfig
from ..errors import AiluRusError
from ..hooks import Hooks
from ..per_thread import PerThread
from ..status import LocationStatus, Record

# Clusters of fewer from clusters, their representatives, all tokens, the grid and M.
JoinFunction = Callable[..., TokenClusters]

logger = logging.getLogger(__name__)


class Reducer(ABC):
    """Hooks on one module that run a part of its forward on representatives.

    A subclass overwrites:

    - **find** -- the modules in a model that it can reduce, each checked against the settings before any hook is
    placed.
    - **put_hooks** -- the hooks, put on by `self.hooks`, so that `remove` can take them off.
    - **status** -- a row of the status table for each location.

    What one forward keeps from hook to hook lies in a `PerThread` named in `per_forward`, and is taken from there by a
    hook with `always_call`, so that nothing is left where a forward raises.

    Args:
        module: where the reducer is remembered.
        config: the settings.
        clustering: from Tensor[B, N, C], the grid and M to TokenClusters.
        num_locations: how many rows the status table has.
    """

    per_forward: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, module: nn.Module, config: AiluRusConfig, clustering: ClusterFunction, num_locations: int = 1
    ) -> None:
        self.module = module
        self.config = config
        self.clustering = clustering
        self.records = [Record() for _ in range(num_locations)]
        self.hooks = Hooks()

    @classmethod
    @abstractmethod
    def find(
        cls, target: nn.Module, config: AiluRusConfig, clustering: ClusterFunction, join: JoinFunction
    ) -> Sequence[Reducer]:
        """One reducer for each part of `target` that this class can reduce.

        Args:
            target: a model; it is not changed.
            config: the settings, which are checked against the model.
            clustering: from Tensor[B, N, C], the grid and M to TokenClusters.
            join: from clusters, their representatives, all tokens, the grid and a smaller M to TokenClusters.

        Raises:
            AiluRusError: the settings do not fit the model.
        """

    @abstractmethod
    def put_hooks(self) -> None:
        """Puts hooks on by `self.hooks`; raises nothing that `find` could have raised."""

    @abstractmethod
    def status(self) -> list[LocationStatus]:
        """What the last forward did at each location."""

    def install(self) -> None:
        """Switches the reduction on."""
        self.put_hooks()
        logger.debug("%s on: %s", self, self.config)

    def remove(self) -> None:
        """Switches it off and leaves no hook or attribute."""
        self.hooks.remove()
        logger.debug("%s off", self)

    def check_idle(self) -> None:
        """Raises AiluRusError while another thread is in the middle of a forward."""
        states: list[PerThread[Any]] = [getattr(self, name) for name in self.per_forward]
        if any(state.is_busy_elsewhere() for state in states):
            raise AiluRusError(
                f"another thread is in the middle of a forward of {type(self.module).__name__}: switch on or off when "
                "it is done"
            )

    def forget(self, module: nn.Module, args: tuple, output: Any) -> None:
        """A hook with `always_call`: what the forward kept is gone, also where it raised."""
        for name in self.per_forward:
            getattr(self, name).pop()

    def __str__(self) -> str:
        return f"{type(self).__name__} of {type(self.module).__name__}"


def refuse_tracing(module: nn.Module) -> None:
    """Raises AiluRusError under torch.jit.trace, which would write one image's sizes and clusters down for all."""
    if torch.jit.is_tracing():
        raise AiluRusError(
            f"torch.jit.trace, and the ONNX export by it, cannot follow the reduction of {type(module).__name__}: use "
            "torch.export.export, or torch.onnx.export(..., dynamo=True)"
        )


def refuse_stages(target: nn.Module, config: AiluRusConfig) -> None:
    """Raises AiluRusError where the settings name stages, of a model that has none."""
    if config.stages is not None:
        raise AiluRusError(
            f"{type(target).__name__} has no stages to choose from: leave stages out, got stages={config.stages}"
        )
