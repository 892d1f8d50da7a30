"""A clustering as a graph of its own, by torch.compile: fewer launches, in models that run eagerly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..clusters import TokenClusters
from ..config import AiluRusConfig, AiluRusDiffusionConfig
from ..errors import AiluRusError
from ..profiling import recorded
from .base import ClusterFunction, Clustering, get_clustering
from .neighbors import Grid

# Assignment, centers and counts: a graph gives tensors.
Parts = tuple[Tensor, Tensor | None, Tensor]


@dataclass(frozen=True)
class Compiled(Clustering):
    """Another clustering, compiled for each size of its input.

    It holds no graph: graphs lie in torch, are found by size, and are shared by clusterings that are equal. So copies
    and pickles are like the original, and another image of the same size compiles nothing.

    Args:
        clustering: what makes the clusters; hashable, as frozen dataclasses of numbers are.

    Raises:
        AiluRusError: it is not hashable; from a call, where there is no compiler, or where it makes no one graph.
    """

    clustering: Clustering

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            hash(self.clustering)
        except TypeError as error:
            raise AiluRusError(f"{self.clustering} must be hashable to be compiled: {error}") from None

    def cluster(self, features: Tensor, grid: Grid, num_clusters: int) -> TokenClusters:
        return self._run(_cluster, grid, num_clusters, features)

    def join(
        self, clusters: TokenClusters, representatives: Tensor, tokens: Tensor, grid: Grid, num_clusters: int
    ) -> TokenClusters:
        """As the other clustering does, compiled."""
        given = (clusters.assignment, clusters.centers, clusters.counts, representatives, tokens)
        return recorded("ailurus::cluster", self._run, _join, grid, num_clusters, *given)

    def _run(
        self, function: Callable[..., Parts], grid: Grid, num_clusters: int, *given: Tensor | None
    ) -> TokenClusters:
        # Part of a larger graph already; shapes alone, or operators that somebody counts, which no compiler takes.
        is_shape = any(each is not None and each.is_meta for each in given)
        if torch.compiler.is_compiling() or is_shape or is_in_torch_dispatch_mode():
            return TokenClusters(*function(self.clustering, grid, num_clusters, *given))
        with torch.no_grad():
            given = tuple(None if each is None else each.detach() for each in given)
            sizes = tuple(None if each is None else (each.shape, each.dtype, each.device) for each in given)
            try:
                return TokenClusters(*_graph(function, self.clustering, grid, num_clusters, sizes)(*given))
            except RuntimeError as error:
                from torch._dynamo.exc import TorchDynamoException

                if not isinstance(error, TorchDynamoException):
                    raise
                raise AiluRusError(
                    f"{self.clustering} cannot be compiled here ({str(error).strip().splitlines()[0]}): torch.compile "
                    "needs a C++ compiler for a CPU and Triton for a GPU; compile_clustering=False needs neither"
                ) from error


def _cluster(clustering: Clustering, grid: Grid, num_clusters: int, features: Tensor) -> Parts:
    return _parts(clustering.cluster(features, grid, num_clusters))


def _join(
    clustering: Clustering,
    grid: Grid,
    num_clusters: int,
    assignment: Tensor,
    centers: Tensor | None,
    counts: Tensor,
    representatives: Tensor,
    tokens: Tensor,
) -> Parts:
    clusters = TokenClusters(assignment, centers, counts)
    return _parts(clustering.join(clusters, representatives, tokens, grid, num_clusters))


def _parts(clusters: TokenClusters) -> Parts:
    return clusters.assignment, clusters.centers, clusters.counts


@lru_cache(maxsize=64)
def _graph(
    function: Callable[..., Parts], clustering: Clustering, grid: Grid, num_clusters: int, sizes: Any
) -> Callable[..., Parts]:
    """The compiled function of one size."""

    def run(*given: Tensor | None) -> Parts:
        return function(clustering, grid, num_clusters, *given)

    # torch keeps graphs by a function's code, and no more than eight: a copy of the code for each size.
    run.__code__ = run.__code__.replace()
    compiled: Callable[..., Parts] = torch.compile(run, fullgraph=True, dynamic=False)
    return compiled


def clustering_of(
    config: AiluRusConfig | AiluRusDiffusionConfig, instead: str | Clustering | ClusterFunction | None = None
) -> Clustering:
    """The clustering that a config asks for, or one instead of it; compiled where the config says so."""
    chosen = get_clustering(instead or config.clustering)
    return Compiled(chosen) if config.compile_clustering else chosen
