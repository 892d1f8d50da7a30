"""NetworkReducer: what is shared by the stacks of one network: its hooks, its assignments, and when to cluster.

A forward of the network begins a run (store.py); the stacks (stacks.py) or the processor (processor.py) ask `assign` for
the clusters of their grid; the end of the forward ends the run.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType

import torch
from torch import Tensor, nn

from ..clustering import ClusterFunction
from ..clusters import TokenClusters
from ..config import AiluRusDiffusionConfig
from ..errors import AiluRusError
from ..grid_cache import grid_table
from ..hooks import Hooks
from ..precision import without_autocast
from ..status import Record
from .backend import Call, Stack, pairs_halves, self_attentions
from .frames import Frames, JointClusters
from .store import AssignmentStore, Run, place_among

log = logging.getLogger(__name__)

# Tokens are compared in this many random directions: distances survive that, and it costs a fifth of 320 channels.
COMPARED_CHANNELS = 64


@dataclass
class Attending:
    """A stack whose self-attention alone is reduced, and its grid."""

    stack: Stack
    grid: tuple[int, ...]


@dataclass(eq=False)
class NetworkReducer:
    """Hooks on one network. `pipeline` knows the schedule and whether guidance is on; it may be gone, or never was.

    processor, previous_processors: with scope="attention", what self-attention runs on now, and what it ran on before.
    last_levels: of each stack's grid, in the last forward.
    """

    network: nn.Module
    config: AiluRusDiffusionConfig
    stacks: list[Stack]
    clustering: ClusterFunction
    pipeline: ReferenceType | None = None
    records: dict[str, Record] = field(default_factory=dict)
    hooks: Hooks = field(default_factory=Hooks)
    processor: Any = None
    previous_processors: dict[str, Any] = field(default_factory=dict)
    lost_processors: list[str] = field(default_factory=list)
    last_levels: dict[str, int] = field(default_factory=dict)
    said_nothing: bool = False

    def __post_init__(self) -> None:
        self.store = AssignmentStore(self.config)
        self.call = Call(self.network)
        self.records = {stack.name: Record() for stack in self.stacks}
        for stack in self.stacks:
            if self.first_reduced(stack) >= len(stack.blocks):
                raise AiluRusError(
                    f"cluster_location must be below the {len(stack.blocks)} blocks of {type(self.network).__name__}, "
                    f"got {self.config.cluster_location}"
                )

    def install(self) -> None:
        self.hooks.pre_forward(self.network, self.begin)
        self.hooks.post_forward(self.network, self.end)

    def remove(self) -> None:
        self.hooks.remove()
        if self.processor is not None:
            lost = self.without_processor()
            for name, layer in self_attentions(self.stacks).items():
                # What somebody else has put there since stays.
                if name not in lost:
                    layer.set_processor(self.previous_processors[name])

    def first_reduced(self, stack: Stack) -> int:
        """Which of its blocks is the first on representatives."""
        return 0 if stack.on_maps else self.config.cluster_location

    def set_processor(self, processor: Any) -> None:
        """Runs self-attention on one processor; `remove` puts back what was there."""
        self.processor = processor
        for name, layer in self_attentions(self.stacks).items():
            self.previous_processors[name] = layer.processor
            layer.set_processor(processor)

    def without_processor(self) -> list[str]:
        """Self-attention layers that run on something else by now."""
        return [
            name
            for name, layer in self_attentions(self.stacks).items()
            if self.processor not in (layer.processor, getattr(layer.processor, "stands_for", None))
        ]

    def begin(self, network: nn.Module, args: tuple, kwargs: dict) -> None:
        given = self.call.argument("cross_attention_kwargs", args, kwargs) or {}
        for name in ("ip_adapter_masks", "gligen"):
            if given.get(name) is not None:
                raise AiluRusError(f"{name} in cross_attention_kwargs cannot follow merged tokens: call without them")
        latents, compiling = self.call.latents(args, kwargs), torch.compiler.is_compiling()
        timestep, pipeline = self._schedule(args, kwargs)
        if not compiling and self.processor is not None:
            self._notice_lost_processors()
        share = self.config.share_cfg
        if share and latents.shape[0] % 2:
            raise AiluRusError(f"share_cfg takes a batch as two halves, but it has {latents.shape[0]} images")
        if share is None:
            share = latents.shape[0] % 2 == 0 and self._pairs_halves(pipeline, args, kwargs)
        self.store.begin(max(latents.shape[-2:]), share, timestep, pipeline)

    def _pairs_halves(self, pipeline: Any, args: tuple, kwargs: dict) -> bool:
        return pairs_halves(pipeline, self.call, args, kwargs)

    def _schedule(self, args: tuple, kwargs: dict) -> tuple[Any, Any]:
        """The timestep of this call, and the pipeline that makes it, None where it is not known."""
        timestep = self.call.argument("timestep", args, kwargs)
        # The compiler cannot follow the reference to a pipeline.
        return timestep, None if torch.compiler.is_compiling() else self._pipeline_of(timestep)

    def _pipeline_of(self, timestep: Any) -> Any:
        """The pipeline, if it is the one that makes this call: another may have the same network."""
        pipeline = None if self.pipeline is None else self.pipeline()
        timesteps = getattr(getattr(pipeline, "scheduler", None), "timesteps", None)
        return None if place_among(timesteps, timestep) is None else pipeline

    def end(self, network: nn.Module, args: tuple, output: Any) -> None:
        run = self.store.run
        if run is not None and run.most_unreduced and not run.assignments and not torch.compiler.is_compiling():
            self._say_that_nothing_was_reduced(run.most_unreduced)
        self.store.end()

    def num_clusters(self, run: Run, grid: tuple[int, ...]) -> int:
        """M for a grid in this forward; N where it runs unreduced."""
        num_tokens = math.prod(grid)
        return self.config.clusters_for(num_tokens, level_of(run, grid)) if run.reduce else num_tokens

    def assign(self, run: Run, stack: Stack, grid: tuple[int, ...], tokens: Tensor) -> TokenClusters | JointClusters:
        """The run's clusters of a grid, made from Tensor[B, N, C] if it has none."""
        if tokens.shape[1] != math.prod(grid):
            raise AiluRusError(f"grid {grid} has {math.prod(grid)} places, but there are {tokens.shape[1]} tokens")
        frames, num_clusters = frames_of(stack), self.num_clusters(run, grid)
        own = stack.name if self.config.cluster_per == "stack" else ""
        key = grid, tokens.shape[0], None if frames is None else frames.numbers, own
        clusters = run.assignments.get(key)
        made = clusters is None
        if clusters is None:
            if frames is not None and frames.all_joined and self.config.frames == "joint":
                clusters = self._cluster_videos(frames, tokens, grid, num_clusters, run.share_cfg)
            else:
                clusters = cluster_tokens(self.clustering, tokens, grid, num_clusters, run.share_cfg)
            run.assignments[key] = clusters
        record = self.records[stack.name]
        record.attended = 1 if frames is None else len(frames.sources[0])
        if isinstance(clusters, JointClusters):
            record.reduced(tokens.shape[1], num_clusters, clusters.clusters, (clusters.frames, *grid), made)
        else:
            record.reduced(tokens.shape[1], num_clusters, clusters, grid, made)
        return clusters

    def _cluster_videos(
        self, frames: Frames, tokens: Tensor, grid: tuple[int, ...], num_clusters: int, share_halves: bool
    ) -> JointClusters:
        """Clusters over space and time, as many a frame as there would be of each frame alone."""
        count, videos = frames.count, frames.videos(tokens.shape[0])
        if share_halves and videos % 2:
            raise AiluRusError(f"share_cfg takes a batch as two halves, but it has {videos} videos of {count} frames")
        joined = tokens.reshape(videos, -1, tokens.shape[2])
        return JointClusters(
            cluster_tokens(self.clustering, joined, (count, *grid), count * num_clusters, share_halves), count
        )

    def assign_current(self, tokens: Tensor) -> TokenClusters | JointClusters | None:
        """For the processor: clusters of the stack that is running, None where it runs unreduced."""
        run = self.store.run
        if run is None or not isinstance(run.current, Attending):
            return None
        stack, grid = run.current.stack, run.current.grid
        if self.num_clusters(run, grid) == math.prod(grid):
            self.leave(run, stack, tokens.shape[1])
            return None
        return self.assign(run, stack, grid, tokens)

    def merges_queries(self) -> bool:
        """For the processor: whether the stack that is running asks for its clusters alone."""
        run = self.store.run
        assert run is not None and isinstance(run.current, Attending)
        return self.config.merges_queries(level_of(run, run.current.grid))

    def leave(self, run: Run, stack: Stack, num_tokens: int) -> None:
        """A stack runs unreduced."""
        record, frames = self.records[stack.name], frames_of(stack)
        record.attended = 1 if frames is None else len(frames.sources[0])
        record.unreduced(num_tokens)
        if run.reduce:
            run.most_unreduced = max(run.most_unreduced, num_tokens)

    def _say_that_nothing_was_reduced(self, most: int) -> None:
        if not self.said_nothing and self.config.keep_ratio != 1:
            self.said_nothing = True
            log.warning(
                "%s ran on all tokens: its largest grid has %d of them, and those of fewer than min_tokens=%d, and "
                "levels that keep_ratio leaves out, are left alone",
                type(self.network).__name__,
                most,
                self.config.min_tokens,
            )

    def _notice_lost_processors(self) -> None:
        layers, lost = self_attentions(self.stacks), self.without_processor()
        if lost and lost != self.lost_processors:
            log.warning(
                "%d of %d self-attention layers of %s no longer have the processor of apply_ailurus and run as they "
                "are now: load_ip_adapter, enable_attention_slicing and fuse_qkv_projections replace processors. Call "
                "apply_ailurus again",
                len(lost),
                len(layers),
                type(self.network).__name__,
            )
        self.lost_processors = lost


def level_of(run: Run, grid: tuple[int, ...]) -> int:
    """How many times smaller a grid's sides are than the latents'."""
    # Sides are halved and rounded up, so a level is known by its nearest power of two.
    return 2 ** round(math.log2(run.latent_side / max(grid)))


def frames_of(stack: Stack) -> Frames | None:
    """The frames that a batch holds, where the stack's self-attention runs on a CrossFrameProcessor."""
    layer = getattr(stack.blocks[0], "attn1", None)
    return getattr(getattr(layer, "processor", None), "frames", None)


@torch.no_grad()
def cluster_tokens(
    clustering: ClusterFunction, tokens: Tensor, grid: tuple[int, ...], num_clusters: int, share_halves: bool = False
) -> TokenClusters:
    """Clusters of Tensor[B, N, C]; share_halves: both halves of the batch get those of their mean."""
    features = tokens
    if tokens.shape[2] > COMPARED_CHANNELS:
        features = _projected(tokens.float())
    if not share_halves:
        return clustering(features, grid, num_clusters)
    first, second = features.chunk(2)
    shared = clustering((first + second) / 2, grid, num_clusters)
    centers = None if shared.centers is None else shared.centers.repeat(2, 1)
    return TokenClusters(shared.assignment.repeat(2, 1), centers, shared.counts.repeat(2, 1))


@without_autocast
def _projected(tokens: Tensor) -> Tensor:
    """Tensor[B, N, C] in fewer channels, about as far from one another."""
    return tokens @ directions(tokens.shape[2], COMPARED_CHANNELS, tokens.device)


@grid_table
def directions(channels: int, number: int, device: torch.device) -> Tensor:
    """The same random directions in every process: Tensor[channels, number]."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(channels, number, generator=generator) / math.sqrt(number)).to(device)
