"""Ways of clustering a token grid, one file each; all return TokenClusters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from ..clusters import TokenClusters
from ..config import AiluRusConfig, AiluRusDiffusionConfig
from .density_peaks import spatial_density_peaks
from .local_kmeans import local_kmeans

# From Tensor[B, N, C], the grid and M.
Clustering = Callable[[Tensor, tuple[int, ...], int], TokenClusters]


def configured(config: AiluRusConfig | AiluRusDiffusionConfig) -> Clustering:
    """The clustering that a config asks for, with its settings."""
    if config.clustering == "local_kmeans":
        return partial(local_kmeans, check_finite=config.check_finite)
    return partial(
        spatial_density_peaks,
        num_spatial_neighbors=config.num_spatial_neighbors,
        alpha=config.alpha,
        num_density_neighbors=config.num_density_neighbors,
        check_finite=config.check_finite,
    )


__all__ = ["Clustering", "configured", "local_kmeans", "spatial_density_peaks"]
