"""What to reduce, where and how: AiluRusConfig for vision transformers; for diffusion see config_diffusion.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from .checks import check_ratios
from .choices import CLUSTERINGS, FRAMES, RESTORES, RESTORES_AT, SCOPES, Restore, RestoreAt, clustering_names
from .config_base import Config, check_clustering, from_fields, rounded_share
from .config_diffusion import AiluRusDiffusionConfig
from .errors import AiluRusError
from .level import Level
from .presets import VISION_PRESETS, VisionPreset

if TYPE_CHECKING:
    from .clustering import Clustering
else:
    Clustering = Any  # read when fields are checked; the clusterings need torch, and this file does not

__all__ = [
    "CLUSTERINGS",
    "FRAMES",
    "RESTORES",
    "RESTORES_AT",
    "SCOPES",
    "AiluRusConfig",
    "AiluRusDiffusionConfig",
    "Level",
    "clustering_names",
    "from_fields",
    "rounded_share",
]


@dataclass(frozen=True, kw_only=True)
class AiluRusConfig(Config):
    """How a vision transformer's tokens are reduced; checked when made (arXiv:2311.01197).

    Args:
        cluster_location: L, cluster at the output of the L-th layer (0: of the embeddings), as in the paper's tables.
            Several, ascending, reduce step by step: each joins the clusters of the one before to larger ones.
        num_clusters, keep_ratio: M itself, or M = round(keep_ratio * N) by image size; exactly one of them, with as
            many numbers as there are locations, descending. An image of at most M tokens runs unreduced.
        min_keep_ratio: with it an image keeps between this share of its tokens and keep_ratio, the more the more detail
            it has (clustering/budget.py). None: all keep keep_ratio. For one location, batches of one image, not
            compiled.
        clustering: a name, or a `Clustering` with settings of its own (`DensityPeaks(alpha=0.8)`), also as a mapping.
            "density_peaks" is the paper's; "local_kmeans" loses less where few tokens are kept; "kmeans" makes clusters
            across the whole image, for self-attention in diffusion; "pairs" leaves alone what is unlike all else, for
            classification, best in several small steps; "ward" loses least in dense prediction and takes longest.
            `register_clustering` adds others.
        restore: "copy" (the paper: a token takes its representative's value), "smooth" (a token takes a mean of the
            representatives around it, weighted by likeness), or "residual" (a token keeps its own value at L and adds
            what its representative gained since). None: "copy" where restore_at="decoder", else "residual".
        restore_at: "backbone", or "decoder" (the paper: a token decoder runs on M tokens too; not for "residual").
            None: "backbone" for "residual", else "decoder". Models without a token decoder unmerge after the backbone.
        restore_location: R > L, the layers after the R-th run on all tokens again; None: none do.
        stages: of a model in stages (SegFormer), the numbers of those that are reduced, 1 the first; None: the third.
            L and R then count the layers of a stage.
        compile_clustering: run the clustering through torch.compile, in models that run eagerly too: fewer launches,
            for a GPU; the first image of each size compiles, for seconds. Not with min_keep_ratio.
        check_finite: raise on NaN features instead of clustering them arbitrarily; this waits for the device.

    Raises:
        AiluRusError: a value is wrong, or two do not go together.

    Example:
        >>> config = AiluRusConfig(cluster_location=2, keep_ratio=0.25, clustering="ward", restore="smooth")
        >>> config.clusters_for(1600)
        400
    """

    cluster_location: int | tuple[int, ...] = 2
    num_clusters: int | tuple[int, ...] | None = None
    keep_ratio: float | tuple[float, ...] | None = None
    min_keep_ratio: float | None = None
    clustering: str | Clustering | Mapping[str, Any] = "local_kmeans"
    restore: Restore | None = None
    restore_at: RestoreAt | None = None
    restore_location: int | None = None
    stages: tuple[int, ...] | None = None
    compile_clustering: bool = False
    check_finite: bool = False

    @classmethod
    def paper(cls, cluster_location: int, num_clusters: int) -> AiluRusConfig:
        """The paper's exact form, whatever the defaults are (AiluRus, sections 3.2 and 4.1)."""
        return cls.preset("paper", cluster_location=cluster_location, num_clusters=num_clusters)

    @classmethod
    def preset(cls, name: VisionPreset, **overrides: Any) -> AiluRusConfig:
        """Settings that were measured, as a start.

        Args:
            name: "paper", the paper's form with 400 clusters after layer 2 (its Figures 3 and 4).
                "dense", for segmentation: Ward's clusters on a quarter of the tokens after layer 2, unmerged smoothly:
                nothing lost on CamVid, at 3.3 times fewer FLOPs (docs/method.md, "clusters of CamVid").
                "classification": pairs in two steps, 65 % after layer 1 and 37 % after layer 3: 0.12 points lost on
                CIFAR-10 at 1.89x (docs/results.md, "classification in steps").
            overrides: fields that replace the preset's. num_clusters replaces keep_ratio, and the other way round.
        """
        return cls._of_preset(VISION_PRESETS, name, overrides)

    def _check(self) -> None:
        for name in ("cluster_location", "num_clusters", "keep_ratio"):
            if isinstance(value := getattr(self, name), tuple) and len(value) == 1:
                object.__setattr__(self, name, value[0])
        if (self.num_clusters is None) == (self.keep_ratio is None):
            raise AiluRusError(
                "give exactly one of num_clusters and keep_ratio, "
                f"got num_clusters={self.num_clusters} and keep_ratio={self.keep_ratio}"
            )
        self._check_locations()
        if self.restore is None:
            object.__setattr__(self, "restore", "copy" if self.restore_at == "decoder" else "residual")
        if self.stages is not None and (not self.stages or min(self.stages) < 1):
            raise AiluRusError(f"stages must name one or more stages, 1 the first, got {self.stages}")
        check_clustering(self)
        if self.restore == "residual" and self.restore_at == "decoder":
            raise AiluRusError("restore='residual' unmerges before a decoder: use restore_at='backbone', got 'decoder'")
        if self.restore_location is not None:
            if self.restore_location <= self.locations[-1]:
                raise AiluRusError(
                    f"restore_location must be past cluster_location {self.locations[-1]}, got {self.restore_location}"
                )
            if self.restore_at == "decoder":
                raise AiluRusError(
                    f"restore_location {self.restore_location} restores inside the backbone: "
                    "use restore_at='backbone', got 'decoder'"
                )

    def _check_locations(self) -> None:
        """Locations, and the M of each."""
        locations, counts = self.locations, _each(self.num_clusters)
        if not locations or min(locations) < 0:
            raise AiluRusError(f"cluster_location must be 0 (the embeddings) or more, got {self.cluster_location}")
        if any(b <= a for a, b in pairwise(locations)):
            raise AiluRusError(f"cluster_location must ascend, got {locations}: use {tuple(sorted(set(locations)))}")
        name = "keep_ratio" if self.num_clusters is None else "num_clusters"
        given = _each(getattr(self, name))
        if len(given) != len(locations):
            raise AiluRusError(
                f"{name} has {len(given)} numbers for {len(locations)} locations {locations}: give {len(locations)}"
            )
        if counts and min(counts) < 1:
            raise AiluRusError(f"num_clusters must be at least 1, got {self.num_clusters}")
        check_ratios("keep_ratio", _each(self.keep_ratio))
        if any(b >= a for a, b in pairwise(given)):
            raise AiluRusError(f"{name} must descend from one location to the next, got {given}")
        if self.min_keep_ratio is not None:
            if not isinstance(self.keep_ratio, (int, float)):
                raise AiluRusError(f"min_keep_ratio needs one keep_ratio, the most that is kept, got {self.keep_ratio}")
            if not 0 < self.min_keep_ratio < self.keep_ratio < 1:
                raise AiluRusError(
                    "min_keep_ratio must be above 0 and below keep_ratio, and that below 1, "
                    f"got {self.min_keep_ratio} and {self.keep_ratio}"
                )
            if self.compile_clustering:
                raise AiluRusError("min_keep_ratio makes sizes depend on the image: use compile_clustering=False")

    @property
    def locations(self) -> tuple[int, ...]:
        """Every cluster_location, in order."""
        return _each(self.cluster_location)

    def clusters_for(self, num_tokens: int, index: int = 0) -> int:
        """M for an image of N tokens at the location of that index, the first by default; N where it runs unreduced."""
        if self.num_clusters is not None:
            return min(_each(self.num_clusters)[index], num_tokens)
        return rounded_share(_each(self.keep_ratio)[index], num_tokens)

    @property
    def restores_after_decoder(self) -> bool:
        """Whether a token decoder, where there is one, sees M tokens."""
        if self.restore_at is None:
            return self.restore != "residual" and self.restore_location is None
        return self.restore_at == "decoder"


def _each(value: Any) -> tuple:
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)
