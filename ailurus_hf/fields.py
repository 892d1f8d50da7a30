"""The configs' fields as keyword arguments, for editors and type checkers; a test holds them equal to the configs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypedDict

from .choices import (
    Between,
    ClusteringName,
    ClusterPer,
    FrameClusters,
    Largest,
    Projections,
    Reduce,
    Restore,
    RestoreAt,
    Scope,
)

if TYPE_CHECKING:
    from .clustering import Clustering
    from .config import Level


class AiluRusFields(TypedDict, total=False):
    """The fields of `AiluRusConfig`."""

    cluster_location: int | tuple[int, ...]
    num_clusters: int | tuple[int, ...] | None
    keep_ratio: float | tuple[float, ...] | None
    min_keep_ratio: float | None
    clustering: ClusteringName | str | Clustering | Mapping[str, Any]
    restore: Restore | None
    restore_at: RestoreAt | None
    restore_location: int | None
    stages: tuple[int, ...] | None
    compile_clustering: bool
    check_finite: bool


class AiluRusDiffusionFields(TypedDict, total=False):
    """The fields of `AiluRusDiffusionConfig`."""

    keep_ratio: float | Mapping[int | Largest, float]
    min_tokens: int
    scope: Scope
    reduce: Reduce
    query_ratio: float | None
    levels: Mapping[int, Level] | None
    cluster_location: int
    cluster_per: ClusterPer
    projections: Projections
    refresh_every: int
    full_every: int | None
    inner_every: int | None
    between: Between
    extrapolate: bool
    step_factors: tuple[float, ...] | None
    block_factors: tuple[float, ...] | None
    share_cfg: bool | None
    unreduced_first_steps: int
    unreduced_last_steps: int
    frames: FrameClusters
    clustering: ClusteringName | str | Clustering | Mapping[str, Any]
    compile_clustering: bool
    check_finite: bool
