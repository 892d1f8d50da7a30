"""The choices that settings offer: one `Literal` each, for type checkers and checks at run time. Needs no torch."""

from __future__ import annotations

from typing import Any, Literal, get_args

ClusteringName = Literal["density_peaks", "local_kmeans", "kmeans", "pairs", "ward"]
Restore = Literal["copy", "residual", "smooth"]
RestoreAt = Literal["backbone", "decoder"]
Scope = Literal["blocks", "attention"]
Reduce = Literal["qkv", "kv"]
Projections = Literal["all", "merged"]
Between = Literal["representatives", "nothing"]
ClusterPer = Literal["resolution", "stack"]
FrameClusters = Literal["each", "joint"]
NetworkKind = Literal["unet", "transformer"]
Kernel = Literal["torch", "triton"]
# A level of a UNet, whatever its number: that of the largest grid with tokens.
Largest = Literal["largest"]

# The clusterings that come with the package. `clustering_names()` has the registered ones, too.
CLUSTERINGS: tuple[str, ...] = get_args(ClusteringName)
RESTORES: tuple[str, ...] = get_args(Restore)
RESTORES_AT: tuple[str, ...] = get_args(RestoreAt)
SCOPES: tuple[str, ...] = get_args(Scope)
BETWEEN: tuple[str, ...] = get_args(Between)
FRAMES: tuple[str, ...] = get_args(FrameClusters)
NETWORK_KINDS: tuple[NetworkKind, ...] = get_args(NetworkKind)
KERNELS: tuple[str, ...] = get_args(Kernel)

# Filled by `register_clustering`: every clustering's class by its name.
CLUSTERING_CLASSES: dict[str, type[Any]] = {}


def clustering_names() -> tuple[str, ...]:
    """The names that `clustering=` takes: those that come with the package, then those that were registered.

    Example:
        >>> clustering_names()[:2]
        ('density_peaks', 'local_kmeans')
    """
    return tuple(dict.fromkeys((*CLUSTERINGS, *CLUSTERING_CLASSES)))
