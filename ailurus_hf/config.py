"""What to reduce, where and how: AiluRusConfig for vision transformers, AiluRusDiffusionConfig for diffusion."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .checks import check_settings
from .errors import AiluRusError

CLUSTERINGS = ("density_peaks", "local_kmeans", "kmeans", "pairs", "ward")
RESTORES = ("copy", "residual", "smooth")
RESTORE_PLACES = ("backbone", "decoder")
SCOPES = ("blocks", "attention")
REDUCES = ("qkv", "kv")
PROJECTIONS = ("all", "merged")
CLUSTER_PER = ("resolution", "stack")
FRAMES = ("each", "joint")


@dataclass(frozen=True, kw_only=True)
class AiluRusConfig:
    """How a vision transformer's tokens are reduced; checked when made.

    cluster_location: L, cluster at the output of the L-th layer (0: of the embeddings), as in the paper's tables. Several,
        ascending, reduce several times: clusters are joined to larger ones (with "pairs" and "ward" in their own way, else by
        density peaks).
    num_clusters, keep_ratio: M itself, or M = round(keep_ratio · N) per image size; exactly one of them, with as many
        numbers as there are locations, descending. An image of at most M tokens runs unreduced.
    min_keep_ratio: with it each image keeps between this share of its tokens and keep_ratio, the more the more detail it
        has (clustering/budget.py); None: all keep keep_ratio. For one location, batches of one image, and not compiled.
    clustering: "density_peaks" (the paper), "local_kmeans", which keeps more where few tokens are kept, "kmeans", whose clusters
        are spread over the whole image and which is for diffusion's self-attention, "pairs", which leaves what is unlike all
        else alone and is for classification, best in several small steps, or "ward", which keeps most in dense prediction
        and costs most.
    alpha, num_spatial_neighbors, num_density_neighbors: α, λ and k of density peaks.
    restore: "copy" (the paper: a token takes its representative's value), "smooth" (a token takes a mean of the
        representatives around it, by likeness), or "residual" (a token keeps its own value at L and adds what its
        representative gained since; the default but for restore_at="decoder").
    restore_at: "backbone", or "decoder" (the paper: a token decoder runs on M tokens too; not for residual); None:
        "backbone" for residual, else "decoder". Models without a token decoder restore after the backbone either way.
    restore_location: R > L, the layers after the R-th run on all tokens again; None: none do.
    stages: of a model in stages (SegFormer), the numbers of those that are reduced, 1 the first; None: the third.
        L and R then count the layers of a stage.
    check_finite: raise on NaN features instead of clustering them somehow; this waits for the device.
    """

    cluster_location: int | tuple[int, ...] = 2
    num_clusters: int | tuple[int, ...] | None = None
    keep_ratio: float | tuple[float, ...] | None = None
    min_keep_ratio: float | None = None
    clustering: str = "local_kmeans"
    alpha: float = 0.9
    num_spatial_neighbors: int = 50
    num_density_neighbors: int = 1
    restore: str | None = None
    restore_at: str | None = None
    restore_location: int | None = None
    stages: tuple[int, ...] | None = None
    check_finite: bool = False

    @classmethod
    def paper(cls, cluster_location: int, num_clusters: int) -> AiluRusConfig:
        """The paper's exact form, whatever the defaults are (AiluRus, sections 3.2 and 4.1)."""
        return cls(
            cluster_location=cluster_location,
            num_clusters=num_clusters,
            clustering="density_peaks",
            alpha=0.9,
            num_spatial_neighbors=50,
            num_density_neighbors=1,
            restore="copy",
            restore_at="decoder",
            restore_location=None,
        )

    def __post_init__(self) -> None:
        for name in ("cluster_location", "num_clusters", "keep_ratio"):
            # JSON knows no tuples; a tuple of one is the number.
            if isinstance(value := getattr(self, name), (list, tuple)):
                object.__setattr__(self, name, tuple(value) if len(value) != 1 else value[0])
        if (self.num_clusters is None) == (self.keep_ratio is None):
            raise AiluRusError(
                "give exactly one of num_clusters and keep_ratio, "
                f"got num_clusters={self.num_clusters} and keep_ratio={self.keep_ratio}"
            )
        self._check_places()
        check_settings(self.num_spatial_neighbors, self.alpha, self.num_density_neighbors)
        if self.restore is None:
            object.__setattr__(self, "restore", "copy" if self.restore_at == "decoder" else "residual")
        if self.stages is not None:
            object.__setattr__(self, "stages", tuple(self.stages))
            if not self.stages or min(self.stages) < 1:
                raise AiluRusError(f"stages must name one or more stages, 1 the first, got {self.stages}")
        _check_choice("clustering", self.clustering, CLUSTERINGS)
        _check_choice("restore", self.restore, RESTORES)
        if self.restore_at is not None:
            _check_choice("restore_at", self.restore_at, RESTORE_PLACES)
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

    def _check_places(self) -> None:
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
        if any(not 0 < ratio <= 1 for ratio in _each(self.keep_ratio)):
            raise AiluRusError(f"keep_ratio must be above 0 and at most 1, got {self.keep_ratio}")
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

    @property
    def locations(self) -> tuple[int, ...]:
        """Every cluster_location, in order."""
        return _each(self.cluster_location)

    def clusters_for(self, num_tokens: int, place: int = 0) -> int:
        """M for an image of N tokens at one of the locations, the first by default; N where it runs unreduced."""
        if self.num_clusters is not None:
            return min(_each(self.num_clusters)[place], num_tokens)
        return rounded_share(_each(self.keep_ratio)[place], num_tokens)

    @property
    def restores_after_decoder(self) -> bool:
        """Whether a token decoder, where there is one, sees M tokens."""
        if self.restore_at is None:
            return self.restore != "residual" and self.restore_location is None
        return self.restore_at == "decoder"

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-serializable dict; what `from_dict` reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> AiluRusConfig:
        """The config of a dict; keys of a later version are ignored with a warning."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            warnings.warn(f"ignoring unknown AiluRusConfig fields {unknown}", stacklevel=2)
        return cls(**{name: value for name, value in fields.items() if name in known})


@dataclass(frozen=True, kw_only=True)
class AiluRusDiffusionConfig:
    """How the image tokens of a diffusion network are reduced; checked when made.

    keep_ratio: M = round(keep_ratio · N) at every resolution; or a dict from how many times smaller than the latents a
        resolution's sides are (1, 2, 4, 8) to its ratio: resolutions that it leaves out run unreduced.
    min_tokens: grids of fewer tokens run unreduced.
    scope: "blocks" (whole stacks of transformer blocks run on M tokens: self-attention with counts, cross-attention and
        MLP; each token then adds what its representative gained) or "attention" (self-attention alone). Or, for UNets, a
        dict from resolutions, as in keep_ratio, to these: those that it leaves out are of scope "blocks".
    reduce: with scope="attention", "qkv", or "kv" (every token still asks; only keys and values are merged). Or a dict from
        resolutions to these, for UNets: those that it leaves out are of "qkv".
    cluster_location: of transformers on patches (PixArt, DiT, SD3, Flux, Wan), L: tokens are clustered and merged at the
        output of the L-th block, 0: at the first one's input. That is the noisy latents and little else, and one block
        more is a small share of what they have: 1 is the default. In UNets convolutions come first.
    cluster_per: "resolution" (its first stack clusters, in a step, and the later ones take that assignment) or "stack" (each
        clusters its own tokens: nearer to the unreduced network, for one more clustering a stack).
    projections: with scope="blocks", "all" (the linear maps into and out of a stack run on all N tokens, so that what
        sets a token apart from its cluster passes them) or "merged" (on M: faster; it passes around the stack only).
        Transformers on patches (PixArt, DiT, SD3, Flux, Wan) have no such maps.
    refresh_every: denoising steps that share an assignment.
    share_cfg: True: a batch is two halves, without and with the prompt, that share one assignment; None: where the
        pipeline says that its batches are such; False: never.
    unreduced_first_steps, unreduced_last_steps: denoising steps that run on all tokens; the last need a pipeline, which
        knows how many there are.
    frames: where the frames of a video attend to one another (ControlVideoPipeline), "each" clusters frame by frame,
        "joint" over space and time: what stands still is kept once, and not once a frame, and does not flicker, but what
        moves may be held back. Where a frame attends to some of the others only, each is clustered alone.
    clustering, alpha, num_spatial_neighbors, num_density_neighbors, check_finite: as in `AiluRusConfig`.
    """

    keep_ratio: float | Mapping[int, float] = 0.5
    min_tokens: int = 1024
    scope: str | Mapping[int, str] = "blocks"
    reduce: str | Mapping[int, str] = "qkv"
    cluster_location: int = 1
    cluster_per: str = "resolution"
    projections: str = "all"
    refresh_every: int = 1
    share_cfg: bool | None = None
    unreduced_first_steps: int = 0
    unreduced_last_steps: int = 0
    frames: str = "each"
    clustering: str = "local_kmeans"
    alpha: float = 0.9
    num_spatial_neighbors: int = 50
    num_density_neighbors: int = 1
    check_finite: bool = False

    def __post_init__(self) -> None:
        for name in ("keep_ratio", "scope", "reduce"):
            if isinstance(value := getattr(self, name), Mapping):
                # JSON knows no whole numbers as keys.
                levels = {int(level): of_level for level, of_level in value.items()}
                object.__setattr__(self, name, levels)
                wrong = sorted(level for level in levels if level < 1 or level & (level - 1))
                if wrong or not levels:
                    raise AiluRusError(f"{name}'s keys must be of 1, 2, 4, 8, ..., got {wrong or 'none'}")
        for ratio in _of_levels(self.keep_ratio):
            if not 0 < ratio <= 1:
                raise AiluRusError(f"keep_ratio must be above 0 and at most 1, got {ratio}")
        for name, least in (("min_tokens", 1), ("refresh_every", 1), ("cluster_location", 0)):
            if getattr(self, name) < least:
                raise AiluRusError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("unreduced_first_steps", "unreduced_last_steps"):
            if getattr(self, name) < 0:
                raise AiluRusError(f"{name} must be 0 or more, got {getattr(self, name)}")
        check_settings(self.num_spatial_neighbors, self.alpha, self.num_density_neighbors)
        for scope in _of_levels(self.scope):
            _check_choice("scope", scope, SCOPES)
        for reduce in _of_levels(self.reduce):
            _check_choice("reduce", reduce, REDUCES)
        _check_choice("cluster_per", self.cluster_per, CLUSTER_PER)
        _check_choice("projections", self.projections, PROJECTIONS)
        _check_choice("frames", self.frames, FRAMES)
        _check_choice("clustering", self.clustering, CLUSTERINGS)
        if "kv" in _of_levels(self.reduce) and not self.has_scope("attention"):
            raise AiluRusError(f"reduce='kv' keeps every token's query: use scope='attention', got {self.scope!r}")

    def clusters_for(self, num_tokens: int, level: int) -> int:
        """M for a grid of N tokens whose sides are `level` times smaller than the latents'; N where it runs unreduced."""
        if num_tokens < self.min_tokens:
            return num_tokens
        return rounded_share(_at_level(self.keep_ratio, level, 1.0), num_tokens)

    def scope_at(self, level: int) -> str:
        """The scope at a grid whose sides are `level` times smaller than the latents'."""
        scope: str = _at_level(self.scope, level, "blocks")
        return scope

    def merges_queries(self, level: int) -> bool:
        """Whether self-attention at such a grid, if it alone is reduced, asks for M tokens and not for all N."""
        return bool(_at_level(self.reduce, level, "qkv") == "qkv")

    def has_scope(self, scope: str) -> bool:
        """Whether some resolution may be of this scope."""
        return scope == self.scope or (
            isinstance(self.scope, Mapping) and (scope == "blocks" or scope in self.scope.values())
        )

    @property
    def counts_steps(self) -> bool:
        """Whether a forward depends on those before it."""
        return self.refresh_every > 1 or self.unreduced_first_steps > 0 or self.unreduced_last_steps > 0

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-serializable dict; `AiluRusDiffusionConfig(**fields)` reads it."""
        return dataclasses.asdict(self)


def from_fields(kind: type[Any], fields: Mapping[str, Any]) -> Any:
    """A config of fields that a user gave; raises AiluRusError, naming all fields, where one is not known."""
    try:
        return kind(**fields)
    except TypeError as error:
        raise AiluRusError(f"{error}; the fields are {', '.join(kind.__dataclass_fields__)}") from None


def rounded_share(ratio: float, num_tokens: int) -> int:
    """round(ratio · N), halves up, within [1, N]."""
    return min(max(math.floor(ratio * num_tokens + 0.5), 1), num_tokens)


def _each(value: Any) -> tuple:
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


def _at_level(value: Any, level: int, left_out: Any) -> Any:
    """The level's value, `left_out` where a dict has none for it, or the value of all."""
    return value.get(level, left_out) if isinstance(value, Mapping) else value


def _of_levels(value: Any) -> list:
    """One value a level, or the value of all."""
    return list(value.values()) if isinstance(value, Mapping) else [value]


def _check_choice(name: str, value: str | None, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise AiluRusError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
