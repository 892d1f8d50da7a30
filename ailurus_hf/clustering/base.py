"""Clustering: the base class of every way to cluster tokens, and the registry that knows them by name.

A new one is a file with a class, wherever it lives:

    @register_clustering("stripes")
    @dataclass(frozen=True)
    class Stripes(Clustering):
        width: int = 4

        def cluster(self, features, grid, num_clusters):
            ...  # a TokenClusters

Then `AiluRusConfig(clustering="stripes")` and `clustering=Stripes(width=8)` work, and so does every command and
benchmark that takes the name of a clustering.
"""

from __future__ import annotations

import operator
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..checks import check_fields
from ..choices import CLUSTERING_CLASSES, clustering_names
from ..clusters import TokenClusters
from ..errors import AiluRusError
from ..profiling import recorded
from .neighbors import Grid, check_input
from .nested import merge_clusters

# From Tensor[B, N, C], the grid and M.
ClusterFunction = Callable[[Tensor, Grid, int], TokenClusters]
Kind = TypeVar("Kind", bound="type[Clustering]")


@dataclass(frozen=True)
class Clustering(ABC):
    """A way to cluster the tokens of a grid. Subclasses are frozen dataclasses; their fields are its settings.

    A subclass writes `cluster`, and `join` where it joins clusters in another way than by density peaks. Fields are
    checked against their types when an object is made; a subclass that overrides `__post_init__` to check more calls
    `super().__post_init__()` first.

    Example:
        >>> DensityPeaks(alpha=0.8)(torch.randn(1, 12, 4), (3, 4), 5).num_clusters
        5
    """

    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check_fields(self)

    @abstractmethod
    def cluster(self, features: Tensor, grid: Grid, num_clusters: int) -> TokenClusters:
        """M clusters of the tokens. Called without gradient; compiles if it waits for no value.

        Args:
            features: Tensor[B, N, C] of any float type.
            grid: (H, W), or (T, H, W) for video; its product is N.
            num_clusters: M, in [1, N].

        Returns:
            TokenClusters of the N tokens, with M clusters.
        """

    @torch.no_grad()
    def __call__(
        self, features: Tensor, grid: Sequence[int], num_clusters: int, *, check_finite: bool = False
    ) -> TokenClusters:
        """Checks the input, then clusters; in a profiler's trace as "ailurus::cluster".

        Args:
            features: Tensor[B, N, C] of any float type. No gradient flows through the choice.
            grid: (H, W), or (T, H, W) for video; its product is N.
            num_clusters: M, in [1, N].
            check_finite: raise on NaN or infinite features; this waits for the device.

        Raises:
            AiluRusError: the grid does not match N, M is out of range, or `cluster` gave something else than asked for.
        """
        checked = check_input(features, grid, num_clusters, check_finite)
        # A plain number also where torch.compile would keep it symbolic, as for a second keep_ratio.
        num_clusters = operator.index(num_clusters)
        clusters = recorded("ailurus::cluster", self.cluster, features, checked, num_clusters)
        if clusters.assignment.shape != features.shape[:2] or clusters.num_clusters > num_clusters:
            raise AiluRusError(
                f"{type(self).__name__}.cluster must assign {tuple(features.shape[:2])} tokens to {num_clusters} "
                f"clusters, got {tuple(clusters.assignment.shape)} and {clusters.num_clusters}"
            )
        return clusters

    def join(
        self, clusters: TokenClusters, representatives: Tensor, tokens: Tensor, grid: Grid, num_clusters: int
    ) -> TokenClusters:
        """Joins clusters to fewer at a later location: by density peaks among representatives, where nothing else is
        written.

        Args:
            clusters: of the N tokens, M of them.
            representatives: Tensor[B, M, C], of the clusters.
            tokens: Tensor[B, N, C].
            grid: of the N tokens.
            num_clusters: how many to leave, in [1, M].

        Returns:
            TokenClusters of the N tokens; each of the old clusters lies in one of the new.
        """
        return recorded("ailurus::cluster", merge_clusters, clusters, representatives, tokens, grid, num_clusters)

    def to_dict(self) -> dict[str, Any]:
        """Its name and settings as a dict that JSON can hold; what `from_dict` reads."""
        if CLUSTERING_CLASSES.get(self.name) is not type(self):
            raise AiluRusError(
                f"{type(self).__name__} has no name to be saved under: give it one, "
                f'@register_clustering("{type(self).__name__.lower()}")'
            )
        return {"name": self.name, **{field.name: getattr(self, field.name) for field in fields(self)}}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Clustering:
        """The clustering of a dict with a "name" and settings; unknown settings are ignored with a warning.

        Raises:
            AiluRusError: no clustering has that name, or a setting is wrong.
        """
        kind = _class_of(settings.get("name", cls.name or None))
        if not issubclass(kind, cls):
            raise AiluRusError(f"{cls.__name__}.from_dict reads settings of {cls.name!r}, got {kind.name!r}")
        known = [field.name for field in fields(kind)]
        unknown = sorted(set(settings) - {"name", *known})
        if unknown:
            warnings.warn(f"ignoring unknown {kind.__name__} settings {unknown}", stacklevel=2)
        return kind(**{name: value for name, value in settings.items() if name in known})


@dataclass(frozen=True)
class FromFunction(Clustering):
    """A function as a clustering, to compare with; it has no name, and so cannot be saved.

    Args:
        function: from features Tensor[B, N, C], the grid and M to TokenClusters.

    Example:
        >>> def halves(features, grid, num_clusters):
        ...     index = torch.arange(features.shape[1]) * num_clusters // features.shape[1]
        ...     return TokenClusters.from_assignment(index.expand(len(features), -1), num_clusters)
        >>> FromFunction(halves)(torch.randn(1, 12, 4), (3, 4), 2).counts
        tensor([[6., 6.]])
    """

    function: ClusterFunction

    def cluster(self, features: Tensor, grid: Grid, num_clusters: int) -> TokenClusters:
        return self.function(features, grid, num_clusters)


def register_clustering(name: str) -> Callable[[Kind], Kind]:
    """A class decorator: `clustering=name` is then this class with its default settings, in configs, commands and
    benchmarks.

    Args:
        name: what no other clustering is called.

    Returns:
        The decorator, which hands the class on as it is.

    Raises:
        AiluRusError: the name is taken, or the class is no frozen dataclass that derives from `Clustering`.

    Example:
        >>> from dataclasses import dataclass
        >>> @register_clustering("one_of_all")
        ... @dataclass(frozen=True)
        ... class OneOfAll(Clustering):
        ...     def cluster(self, features, grid, num_clusters):
        ...         return TokenClusters.from_assignment(features.new_zeros(features.shape[:2]).long(), num_clusters)
    """
    if not isinstance(name, str) or not name:
        raise AiluRusError(f'a clustering needs a name: @register_clustering("name"), got {name!r}')

    def register(kind: Kind) -> Kind:
        taken = CLUSTERING_CLASSES.get(name)
        if taken is not None:
            raise AiluRusError(
                f"the name {name!r} is taken by {taken.__module__}.{taken.__qualname__}: choose another than "
                f"{', '.join(map(repr, clustering_names()))}"
            )
        if not (isinstance(kind, type) and issubclass(kind, Clustering)):
            raise AiluRusError(f"{getattr(kind, '__name__', kind)} must derive from Clustering to be registered")
        if "__dataclass_params__" not in vars(kind) or not is_dataclass(kind) or not kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            raise AiluRusError(
                f"{kind.__name__} must be a frozen dataclass: write @dataclass(frozen=True) below the name"
            )
        kind.name = name
        CLUSTERING_CLASSES[name] = kind
        return kind

    return register


def get_clustering(value: str | Clustering | Mapping[str, Any] | ClusterFunction) -> Clustering:
    """The clustering that a config's field asks for.

    Args:
        value: a registered name (default settings), a `Clustering`, or a mapping of "name" and settings. A function of
            features, grid and M counts as a clustering, too; it cannot be saved.

    Returns:
        The object; it is called with features, grid and M.

    Raises:
        AiluRusError: it is none of these; the message has the names that there are.

    Example:
        >>> get_clustering({"name": "density_peaks", "alpha": 0.8})
        DensityPeaks(alpha=0.8, num_spatial_neighbors=50, num_density_neighbors=1)
    """
    if isinstance(value, Clustering):
        return value
    if isinstance(value, str):
        return _class_of(value)()
    if isinstance(value, Mapping):
        return Clustering.from_dict(value)
    if callable(value) and not isinstance(value, type):
        return FromFunction(value)
    raise AiluRusError(
        f"clustering must be one of {', '.join(map(repr, clustering_names()))}, a Clustering, or a mapping of its "
        f"name and settings, got {value!r}"
    )


def _class_of(name: Any) -> type[Clustering]:
    if not isinstance(name, str) or name not in CLUSTERING_CLASSES:
        raise AiluRusError(f"clustering must be one of {', '.join(map(repr, clustering_names()))}, got {name!r}")
    return CLUSTERING_CLASSES[name]
