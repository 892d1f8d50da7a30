"""Ways to cluster a token grid, one file each: a function, and the `Clustering` that is registered under its name.

    config.clustering  ->  get_clustering(...)  ->  clustering(features, grid, num_clusters)  ->  TokenClusters

base.py tells how to add one.
"""

from __future__ import annotations

from ..choices import clustering_names
from .base import ClusterFunction, Clustering, FromFunction, get_clustering, register_clustering
from .density_peaks import DensityPeaks, spatial_density_peaks
from .kmeans import KMeans, kmeans
from .local_kmeans import LocalKMeans, local_kmeans
from .nested import merge_clusters
from .pairs import Pairs, join_clusters, pairs
from .ward import Ward, join_regions, ward

__all__ = [
    "ClusterFunction",
    "Clustering",
    "DensityPeaks",
    "FromFunction",
    "KMeans",
    "LocalKMeans",
    "Pairs",
    "Ward",
    "clustering_names",
    "get_clustering",
    "join_clusters",
    "join_regions",
    "kmeans",
    "local_kmeans",
    "merge_clusters",
    "pairs",
    "register_clustering",
    "spatial_density_peaks",
    "ward",
]
