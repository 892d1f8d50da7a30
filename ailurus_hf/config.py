"""What to reduce, where and how: AiluRusConfig for vision transformers, AiluRusDiffusionConfig for diffusion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from .checks import check_at_least, check_choice, check_ratios
from .choices import (
    CLUSTERINGS,
    FRAMES,
    RESTORES,
    RESTORES_AT,
    SCOPES,
    ClusterPer,
    FrameClusters,
    Projections,
    Reduce,
    Restore,
    RestoreAt,
    Scope,
    clustering_names,
)
from .config_base import Config, from_fields
from .errors import AiluRusError
from .level import Level
from .presets import DIFFUSION_PRESETS, VISION_PRESETS, DiffusionPreset, VisionPreset

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
        _check_clustering(self)
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


AS_THE_REST = Level()


@dataclass(frozen=True, kw_only=True)
class AiluRusDiffusionConfig(Config):
    """How the image tokens of a diffusion network are reduced; checked when made.

    Args:
        keep_ratio: M = round(keep_ratio * N) at every resolution; or a mapping from levels (how many times smaller than
            the latents a resolution's sides are: 1, 2, 4, 8) to ratios: levels that it leaves out run unreduced.
        min_tokens: grids of fewer tokens run unreduced.
        scope: "blocks" (whole stacks of transformer blocks run on M tokens: self-attention with counts, cross-attention
            and MLP; each token then adds what its representative gained) or "attention" (self-attention alone).
        reduce: of self-attention alone, "qkv", or "kv" (every token keeps its query; keys and values are merged).
        levels: of UNets, a mapping from levels to a `Level` each, for those that do something else than the rest.
        cluster_location: of transformers on patches (PixArt, DiT, SD3, Flux, Wan), L: tokens are clustered and merged
            at the output of the L-th block, 0: at the first one's input. That is the noisy latents and little else, and
            one block more is a small share of all of them: 1 is the default. In UNets convolutions come first.
        cluster_per: "resolution" (its first stack clusters, once a step, and the later ones take that assignment) or
            "stack" (each clusters its own tokens: nearer to the unreduced network, for one more clustering a stack).
        projections: with scope="blocks", "all" (the linear maps into and out of a stack run on all N tokens, so that
            what sets a token apart from its cluster passes them) or "merged" (on M: faster; it passes around the stack
            only). Transformers on patches have no such maps.
        refresh_every: denoising steps that share an assignment.
        full_every: k, every k-th denoising step is a full one: it runs on all tokens, keeps what each stack of blocks
            added to each of them, and makes the clusters that serve until the next (refresh_every may have them serve
            longer). In the steps between, which run on representatives, a token adds what was kept, corrected by how
            much more or less its representative adds now than then (in full steps the blocks run on representatives,
            too). For whole blocks, in pipelines of diffusers and within `denoising`; not compiled as a whole, and not
            beside a cache of diffusers. 1: every step runs on all tokens. None: none do for this.
        extrapolate: with full_every, what sets tokens apart from their representatives is drawn on in a straight line
            through the last two full steps, as TaylorSeer (arXiv:2503.06923) draws on features.
        step_factors: in so many equal parts of a generation's steps, what keep_ratio is multiplied by (up to 1):
            (2, 1, 0.5) keeps most tokens early. Needs a pipeline, which knows how many steps there are. With full_every
            it changes in full steps.
        share_cfg: True: a batch is two halves, without and with the prompt, that share one assignment; None: where the
            pipeline says that its batches are such; False: never.
        unreduced_first_steps, unreduced_last_steps: denoising steps that run on all tokens; the last need a pipeline,
            which knows how many there are.
        frames: where the frames of a video attend to one another (ControlVideoPipeline), "each" clusters frame by
            frame, "joint" over space and time: what stands still is kept once, and not once a frame, and does not
            flicker, but what moves may be held back. Where a frame attends to some of the others only, each is
            clustered alone.
        clustering, compile_clustering, check_finite: as in `AiluRusConfig`.

    Raises:
        AiluRusError: a value is wrong, or two do not go together.

    Example:
        >>> level = Level(scope="attention", reduce="kv")
        >>> config = AiluRusDiffusionConfig(keep_ratio={1: 0.0625, 2: 0.25}, levels={1: level})
        >>> config.scope_at(1), config.scope_at(2)
        ('attention', 'blocks')
    """

    keep_ratio: float | Mapping[int, float] = 0.5
    min_tokens: int = 1024
    scope: Scope = "blocks"
    reduce: Reduce = "qkv"
    levels: Mapping[int, Level] | None = None
    cluster_location: int = 1
    cluster_per: ClusterPer = "resolution"
    projections: Projections = "all"
    refresh_every: int = 1
    full_every: int | None = None
    extrapolate: bool = False
    step_factors: tuple[float, ...] | None = None
    share_cfg: bool | None = None
    unreduced_first_steps: int = 0
    unreduced_last_steps: int = 0
    frames: FrameClusters = "each"
    clustering: str | Clustering | Mapping[str, Any] = "local_kmeans"
    compile_clustering: bool = False
    check_finite: bool = False

    @classmethod
    def preset(cls, name: DiffusionPreset, **overrides: Any) -> AiluRusDiffusionConfig:
        """Settings that were measured, as a start: SD 1.5 at 512² in half precision (docs/results.md, "settings in half
        precision") for time, a small Stable Diffusion for how near its pictures are ("pictures from text").

        Args:
            name: "fast": whole blocks on a quarter of the tokens, 1.69x, 26.5 dB from the plain pictures.
                "balanced": keys and values alone in the largest grid, blocks in the next, 1.48x, 33.1 dB.
                "faithful": keys and values alone in the largest grid, by k-means, 1.35x, 43.1 dB.
            overrides: fields that replace the preset's.
        """
        return cls._of_preset(DIFFUSION_PRESETS, name, overrides)

    @classmethod
    def _migrated(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """In format 1, scope and reduce could be mappings from levels; what they left out was "blocks" and "qkv"."""
        levels: dict[int, dict[str, Any]] = {}
        for name, left_out in (("scope", "blocks"), ("reduce", "qkv")):
            if isinstance(of_levels := fields.get(name), Mapping):
                fields[name] = left_out
                for level, value in of_levels.items():
                    levels.setdefault(int(level), {})[name] = value
        for level in levels.values():
            # Where blocks are merged, it said nothing.
            if level.get("scope", fields.get("scope", "blocks")) == "blocks":
                level.pop("reduce", None)
        return super()._migrated({**fields, "levels": levels} if levels else fields)

    def _check(self) -> None:
        for name in ("keep_ratio", "levels"):
            if isinstance(levels := getattr(self, name), Mapping):
                wrong = sorted(level for level in levels if level < 1 or level & (level - 1))
                if wrong or not levels:
                    raise AiluRusError(f"{name}'s keys must be of 1, 2, 4, 8, ..., got {wrong or 'none'}")
        check_ratios(
            "keep_ratio", self.keep_ratio.values() if isinstance(self.keep_ratio, Mapping) else [self.keep_ratio]
        )
        check_at_least(1, min_tokens=self.min_tokens, refresh_every=self.refresh_every)
        check_at_least(
            0,
            cluster_location=self.cluster_location,
            unreduced_first_steps=self.unreduced_first_steps,
            unreduced_last_steps=self.unreduced_last_steps,
        )
        _check_clustering(self)
        self._check_full_steps()
        if self.step_factors is not None and not (self.step_factors and min(self.step_factors) > 0):
            raise AiluRusError(f"step_factors must be one or more numbers above 0, got {self.step_factors}")
        if self.reduce == "kv" and not self.has_scope("attention"):
            raise AiluRusError(f"reduce='kv' keeps every token's query: use scope='attention', got {self.scope!r}")
        for number, level in (self.levels or {}).items():
            if level.reduce == "kv" and self.scope_at(number) != "attention":
                raise AiluRusError(
                    f"reduce='kv' keeps every token's query: use scope='attention' at level {number}, got 'blocks'"
                )
            if level.keep_ratio is not None and isinstance(self.keep_ratio, Mapping) and number in self.keep_ratio:
                raise AiluRusError(
                    f"keep_ratio at level {number} is given twice, as {self.keep_ratio[number]} and {level.keep_ratio}"
                )

    def _check_full_steps(self) -> None:
        """What every k-th step on all tokens needs."""
        if self.full_every is not None:
            check_at_least(1, full_every=self.full_every)
            if not self.has_scope("blocks"):
                raise AiluRusError(
                    f"full_every={self.full_every} keeps what stacks of blocks add: use scope='blocks', got "
                    f"{self.scope!r}"
                )
        elif self.extrapolate:
            raise AiluRusError("extrapolate draws on from steps on all tokens: give full_every, got None")

    def clusters_for(self, num_tokens: int, level: int, factor: float = 1.0) -> int:
        """M for a grid of N tokens with sides `level` times smaller than the latents'; N where it runs unreduced.

        factor: of the step, see `step_factors`.
        """
        if num_tokens < self.min_tokens:
            return num_tokens
        ratio = self._at(level).keep_ratio
        if ratio is None:
            ratio = self.keep_ratio.get(level) if isinstance(self.keep_ratio, Mapping) else self.keep_ratio
        return num_tokens if ratio is None else rounded_share(ratio * factor, num_tokens)

    def scope_at(self, level: int) -> Scope:
        """The scope at a grid whose sides are `level` times smaller than the latents'."""
        return self._at(level).scope or self.scope

    def merges_queries(self, level: int) -> bool:
        """Whether self-attention at such a grid, where it alone is reduced, has M queries and not all N."""
        return (self._at(level).reduce or self.reduce) == "qkv"

    def has_scope(self, scope: str) -> bool:
        """Whether some resolution may be of this scope."""
        return scope == self.scope or any(level.scope == scope for level in (self.levels or {}).values())

    def _at(self, level: int) -> Level:
        return (self.levels or {}).get(level) or AS_THE_REST

    @property
    def counts_steps(self) -> bool:
        """Whether a forward depends on those before it."""
        unreduced = self.unreduced_first_steps > 0 or self.unreduced_last_steps > 0
        return self.refresh_every > 1 or unreduced or (self.full_every or 1) > 1 or self.step_factors is not None


def rounded_share(ratio: float, num_tokens: int) -> int:
    """round(ratio * N), halves up, within [1, N]."""
    return min(max(math.floor(ratio * num_tokens + 0.5), 1), num_tokens)


def _each(value: Any) -> tuple:
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


def _check_clustering(config: Any) -> None:
    """A name stays a name, so that a config needs no torch; a mapping becomes the `Clustering` that it describes."""
    if isinstance(config.clustering, str):
        check_choice("clustering", config.clustering, clustering_names())
    else:
        get_clustering = import_module(".clustering", __package__).get_clustering
        object.__setattr__(config, "clustering", get_clustering(config.clustering))
