"""What to reduce in diffusion networks, where and how: AiluRusDiffusionConfig."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .checks import check_at_least, check_ratios
from .choices import NETWORK_KINDS, Between, ClusterPer, FrameClusters, Largest, NetworkKind, Projections, Reduce, Scope
from .config_base import Config, check_clustering, rounded_share
from .errors import AiluRusError
from .level import Level
from .presets import DIFFUSION_PRESETS, TRANSFORMER_PRESETS, DiffusionPreset

if TYPE_CHECKING:
    from .clustering import Clustering
else:
    Clustering = Any  # read when fields are checked; the clusterings need torch, and this file does not

AS_THE_REST = Level()


@dataclass(frozen=True, kw_only=True)
class AiluRusDiffusionConfig(Config):
    """How the image tokens of a diffusion network are reduced; checked when made.

    Args:
        keep_ratio: M = round(keep_ratio * N) at every resolution; or a mapping from levels (how many times smaller than
            the latents a resolution's sides are: 1, 2, 4, 8) to ratios: levels that it leaves out run unreduced.
            "largest" is the level of the largest grid with tokens: 1 in Stable Diffusion 1.5, 2 in SDXL.
        min_tokens: grids of fewer tokens run unreduced.
        scope: "blocks" (whole stacks of transformer blocks run on M tokens: self-attention with counts, cross-attention
            and MLP; each token then adds what its representative gained) or "attention" (self-attention alone).
        reduce: of self-attention alone, "qkv", or "kv" (every token keeps its query; keys and values are merged).
        query_ratio: of self-attention alone, the keep ratio of queries where keys and values, on keep_ratio, are
            reduced; None: the same for all three, in one clustering. Not for joint attention (SD3, Flux), nor for Wan.
        levels: of UNets, a mapping from levels to a `Level` each, for those that do something else than the rest.
        cluster_location: of transformers on patches (PixArt, DiT, SD3, Flux, Wan), L: tokens are clustered and merged
            at the output of the L-th block, 0: at the first one's input. That is the noisy latents and little else, and
            one block more is a small share of all of them: 1 is the default. In UNets convolutions come first.
        cluster_per: "stack" (each clusters its own tokens) or "resolution" (its first stack clusters, once a step, and
            the later ones take that assignment: fewer clusterings, and farther from the unreduced network).
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
        inner_every: k, of UNets and their ControlNets: all layers run in every k-th denoising step (and in those of
            unreduced_first_steps and unreduced_last_steps), in the others the first convolution and the last layer
            alone; what comes to that layer from below is that of the last step in which all ran. That is a cache over
            steps, as DeepCache (arXiv:2312.00858); in layers that run, tokens are reduced as ever. In pipelines of
            diffusers and within `denoising`; not compiled as a whole, not beside full_every, nor a cache of diffusers.
        between: with full_every, what stacks run on in the steps between: "representatives", or "nothing": stacks are
            skipped, and a token adds what was kept alone, of whole blocks at the keep ratios below 1. That is a cache
            over steps and no token reduction; where it is nearer than representatives are, the tables say (presets of
            transformers). Not with projections="merged".
        extrapolate: with full_every or inner_every, what was kept (beside representatives, what sets tokens apart from
            them) is drawn on in a straight line through the last two steps that it was kept in, once these are that
            many steps apart, as TaylorSeer (arXiv:2503.06923) draws on features.
        step_factors: in so many equal parts of a generation's steps, what keep_ratio is multiplied by (up to 1):
            (2, 1, 0.5) keeps most tokens early. Needs a pipeline, which knows how many steps there are. With full_every
            it changes in full steps.
        block_factors: in so many equal parts of a network's stacks of blocks, in the order in which they run, what
            keep_ratio is multiplied by (up to 1): (0.5, 1, 0.5) keeps most tokens in the middle of a UNet. Transformers
            on patches merge once for all blocks: there with scope="attention" alone, by the blocks past
            cluster_location.
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

    keep_ratio: float | Mapping[int | Largest, float] = 0.5
    min_tokens: int = 1024
    scope: Scope = "blocks"
    reduce: Reduce = "qkv"
    query_ratio: float | None = None
    levels: Mapping[int, Level] | None = None
    cluster_location: int = 1
    cluster_per: ClusterPer = "stack"
    projections: Projections = "all"
    refresh_every: int = 1
    full_every: int | None = None
    inner_every: int | None = None
    between: Between = "representatives"
    extrapolate: bool = False
    step_factors: tuple[float, ...] | None = None
    block_factors: tuple[float, ...] | None = None
    share_cfg: bool | None = None
    unreduced_first_steps: int = 0
    unreduced_last_steps: int = 0
    frames: FrameClusters = "each"
    clustering: str | Clustering | Mapping[str, Any] = "local_kmeans"
    compile_clustering: bool = False
    check_finite: bool = False

    @classmethod
    def preset(cls, name: DiffusionPreset, network: NetworkKind = "unet", **overrides: Any) -> AiluRusDiffusionConfig:
        """Settings that were measured, as a start, on a small Stable Diffusion (docs/results.md, "pictures from text,
        inner layers"). They need a pipeline or `denoising`, and a network that is not compiled as a whole.

        Args:
            name: of UNets, few keys and values in the largest grid (a sixteenth, or an eighth that are clustered by
                pairs), and all layers in the first steps and every k-th. "fast": three and every fifth, 3.20x fewer
                FLOPs, 31.1 dB from the plain pictures; "balanced": three and every third, 2.46x, 37.4 dB; "faithful":
                five and every second, 1.74x, 46.5 dB.
            network: "unet", or "transformer" for those on patches, of which a small one was measured (docs/results.md,
                "pictures of a trained transformer"): every fifth, third or second step, and the first three, run on all
                tokens, and nothing runs between. "fast", fewer FLOPs by 3.30x, 39.1 dB from the plain pictures;
                "balanced" 2.48x, 46.1 dB; "faithful" 1.81x, 52.5 dB.
            overrides: fields that replace the preset's.
        """
        if network not in NETWORK_KINDS:
            raise AiluRusError(f"network must be one of {', '.join(map(repr, NETWORK_KINDS))}, got {network!r}")
        presets = TRANSFORMER_PRESETS if network == "transformer" else DIFFUSION_PRESETS
        return cls._of_preset(presets, name, overrides)

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
                numbers = [level for level in levels if level != "largest"]
                wrong = sorted(level for level in numbers if level < 1 or level & (level - 1))
                if wrong or not levels:
                    raise AiluRusError(f"{name}'s keys must be of 1, 2, 4, 8, ..., got {wrong or 'none'}")
        check_ratios(
            "keep_ratio", self.keep_ratio.values() if isinstance(self.keep_ratio, Mapping) else [self.keep_ratio]
        )
        check_ratios("query_ratio", [] if self.query_ratio is None else [self.query_ratio])
        check_at_least(1, min_tokens=self.min_tokens, refresh_every=self.refresh_every)
        check_at_least(
            0,
            cluster_location=self.cluster_location,
            unreduced_first_steps=self.unreduced_first_steps,
            unreduced_last_steps=self.unreduced_last_steps,
        )
        check_clustering(self)
        self._check_full_steps()
        for name, factors in {"step_factors": self.step_factors, "block_factors": self.block_factors}.items():
            if factors is not None and not (factors and min(factors) > 0):
                raise AiluRusError(f"{name} must be one or more numbers above 0, got {factors}")
        if self.reduce == "kv" and not self.has_scope("attention"):
            raise AiluRusError(f"reduce='kv' keeps every token's query: use scope='attention', got {self.scope!r}")
        if self.query_ratio is not None and (self.reduce == "kv" or not self.has_scope("attention")):
            raise AiluRusError(
                f"query_ratio={self.query_ratio} merges the queries of self-attention alone: use scope='attention' and "
                f"reduce='qkv', got {self.scope!r} and {self.reduce!r}"
            )
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
        if self.inner_every is not None:
            check_at_least(1, inner_every=self.inner_every)
            if self.full_every is not None:
                raise AiluRusError(
                    f"full_every={self.full_every} and inner_every={self.inner_every} are two rhythms: give one of them"
                )
        if self.full_every is not None:
            check_at_least(1, full_every=self.full_every)
            if not self.has_scope("blocks"):
                raise AiluRusError(
                    f"full_every={self.full_every} keeps what stacks of blocks add: use scope='blocks', got "
                    f"{self.scope!r}"
                )
        elif self.extrapolate and self.inner_every is None:
            raise AiluRusError("extrapolate draws on what steps kept: give full_every or inner_every, got None")
        elif self.between == "nothing":
            raise AiluRusError("between='nothing' adds what steps on all tokens kept: give full_every, got None")
        if self.between == "nothing" and self.projections == "merged":
            raise AiluRusError("between='nothing' skips blocks alone: use projections='all', got 'merged'")

    def clusters_for(self, num_tokens: int, level: int, factor: float = 1.0, *, largest: bool = False) -> int:
        """M for a grid of N tokens with sides `level` times smaller than the latents'; N where it runs unreduced.

        factor: of the step and of the block, see `step_factors` and `block_factors`. largest: whether the network has
        no tokens at a larger grid.
        """
        if num_tokens < self.min_tokens:
            return num_tokens
        given = self.keep_ratio
        ratios: Mapping[int | Largest, float] = given if isinstance(given, Mapping) else {level: given}
        ratio = self._at(level).keep_ratio or ratios.get(level, ratios.get("largest") if largest else None)
        return num_tokens if ratio is None else rounded_share(ratio * factor, num_tokens)

    def block_factor(self, number: int, count: int) -> float:
        """What keep_ratio is multiplied by in the stack or block of this number, 0 the first, of so many."""
        factors = self.block_factors or (1.0,)
        return factors[number * len(factors) // count]

    def scope_at(self, level: int) -> Scope:
        """The scope at a grid whose sides are `level` times smaller than the latents'."""
        return self._at(level).scope or self.scope

    def merges_queries(self, level: int) -> bool:
        """Whether self-attention at such a grid, where it alone is reduced, has fewer queries than tokens."""
        return (self._at(level).reduce or self.reduce) == "qkv"

    def queries_for(self, num_tokens: int, level: int, num_clusters: int) -> int:
        """How many queries self-attention alone has at such a grid with M keys: M, all N, or what query_ratio says."""
        if not self.merges_queries(level):
            return num_tokens
        if self.query_ratio is None or num_clusters == num_tokens:
            return num_clusters
        return rounded_share(self.query_ratio, num_tokens)

    def has_scope(self, scope: str) -> bool:
        """Whether some resolution may be of this scope."""
        return scope == self.scope or any(level.scope == scope for level in (self.levels or {}).values())

    def _at(self, level: int) -> Level:
        return (self.levels or {}).get(level) or AS_THE_REST

    @property
    def counts_steps(self) -> bool:
        """Whether a forward depends on those before it."""
        unreduced = self.unreduced_first_steps > 0 or self.unreduced_last_steps > 0
        every = max(self.refresh_every, self.full_every or 1, self.inner_every or 1)
        return every > 1 or unreduced or self.step_factors is not None

    @property
    def builds_on_steps(self) -> bool:
        """Whether a step builds on what an earlier one kept."""
        return self.full_every is not None or self.inner_every is not None
