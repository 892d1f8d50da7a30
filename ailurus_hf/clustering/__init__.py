"""Ways of clustering a token grid, one file each; all return TokenClusters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from ..clusters import TokenClusters
from ..config import AiluRusConfig, AiluRusDiffusionConfig
from .density_peaks import spatial_density_peaks
from .kmeans import kmeans
from .local_kmeans import local_kmeans
from .nested import merge_clusters
from .pairs import join_clusters, pairs
from .ward import join_regions, ward

# From Tensor[B, N, C], the grid and M.
Clustering = Callable[[Tensor, tuple[int, ...], int], TokenClusters]

# From the clusters so far, their representatives Tensor[B, M, C], all tokens Tensor[B, N, C], the grid and a smaller M.
Nesting = Callable[[TokenClusters, Tensor, Tensor, tuple[int, ...], int], TokenClusters]


def configured(config: AiluRusConfig | AiluRusDiffusionConfig) -> Clustering:
    """The clustering that a config asks for, with its settings."""
    without_settings = {"kmeans": kmeans, "local_kmeans": local_kmeans, "pairs": pairs, "ward": ward}
    if config.clustering in without_settings:
        return partial(without_settings[config.clustering], check_finite=config.check_finite)
    return partial(
        spatial_density_peaks,
        num_spatial_neighbors=config.num_spatial_neighbors,
        alpha=config.alpha,
        num_density_neighbors=config.num_density_neighbors,
        check_finite=config.check_finite,
    )


def configured_nesting(config: AiluRusConfig) -> Nesting:
    """The clustering of clusters at every place but the first: as the first by pairs and Ward's, else by density peaks."""
    own: dict[str, Nesting] = {"pairs": join_clusters, "ward": join_regions}
    if config.clustering in own:
        return own[config.clustering]
    return partial(
        merge_clusters,
        num_spatial_neighbors=config.num_spatial_neighbors,
        alpha=config.alpha,
        num_density_neighbors=config.num_density_neighbors,
    )


__all__ = [
    "Clustering",
    "Nesting",
    "configured",
    "configured_nesting",
    "join_clusters",
    "join_regions",
    "kmeans",
    "local_kmeans",
    "merge_clusters",
    "pairs",
    "spatial_density_peaks",
    "ward",
]
