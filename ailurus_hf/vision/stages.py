"""SegFormer: queries and Mix-FFN on representatives, stage by stage; between sub-layers all N tokens are there.

Keys and values are few already (a strided convolution makes them), and Mix-FFN's depthwise convolution needs the grid.
So in each reduced layer the attention's input is merged and its keys are made of all tokens; Mix-FFN's linear layers
run on M and its convolution on the grid; and what each sub-layer puts out is given to every token of a cluster, which
adds it to its own value. A stage is clustered once and all its later layers use that.

    block -> attention: merge -> queries of M, keys of the grid -> unmerge
          -> Mix-FFN:   merge -> linear -> unmerge -> convolution -> merge -> linear -> unmerge
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..clustering import ClusterFunction
from ..clusters import TokenClusters
from ..config import AiluRusConfig
from ..errors import AiluRusError
from ..hooks import Hooks
from ..status import LocationStatus, Record
from .backend import attention_configs, qualified_name, use_ailurus_attention
from .forward_state import thread

STAGE = "transformers.models.segformer.modeling_segformer.SegformerStage"
# The stage that holds most of a model's layers; benchmarks/vision/families_speed.py measures the others beside it.
DEFAULT_STAGES = (3,)
# What a block hands on to its attention, where gradient checkpointing finds it again when it recomputes the block.
CLUSTERS = "ailurus_clusters"


@dataclass
class StageRun:
    """What one forward of a stage carries from hook to hook; full: the tokens of the attention that runs just now."""

    clusters: TokenClusters
    full: Tensor | None = None


@dataclass
class StageReducer:
    """Hooks on one stage of SegFormer, its `number` counted from 1. `install` puts them there, `remove` takes them away."""

    module: Any
    number: int
    config: AiluRusConfig
    clustering: ClusterFunction
    records: list[Record] = field(default_factory=lambda: [Record()])
    hooks: Hooks = field(default_factory=Hooks)
    # One model may run in several threads at once, so each has clusters and a ForwardState of its own.
    clusters: dict[int, TokenClusters | None] = field(default_factory=dict)
    runs: dict[int, StageRun] = field(default_factory=dict)

    def __post_init__(self) -> None:
        depth, config = len(self.blocks), self.config
        if config.restore != "residual":
            raise AiluRusError(
                f"SegFormer has all tokens between its layers: use restore='residual', got {config.restore!r}"
            )
        if len(config.locations) > 1:
            raise AiluRusError(
                f"a stage of SegFormer is clustered once, got cluster_location {config.cluster_location}"
            )
        self.first, self.last = config.locations[0], config.restore_location or depth
        if self.first >= depth or self.last > depth:
            raise AiluRusError(
                f"stage {self.number} of SegFormer has {depth} layers: cluster_location has to be 0 to {depth - 1} and "
                f"restore_location at most {depth}, got {self.first} and {config.restore_location}"
            )

    @property
    def blocks(self) -> Any:
        return self.module.blocks

    def install(self) -> None:
        reduced = self.blocks[self.first : self.last]
        hooks = self.hooks
        hooks.pre_forward(reduced[0], self.cluster)
        for block in reduced:
            hooks.pre_forward(block, self.enter_block)
            attention, mlp = block.attention, block.mlp
            hooks.pre_forward(attention, self.enter_attention)
            if attention.sequence_reduction_ratio > 1:
                hooks.pre_forward(attention.sequence_reduction, self.all_tokens)
            hooks.post_forward(attention, self.leave_attention)
            hooks.pre_forward(mlp, self.merge)
            hooks.pre_forward(mlp.dwconv, self.unmerge)
            hooks.post_forward(mlp.dwconv, self.leave_convolution)
            hooks.post_forward(mlp, self.leave_mlp)
        hooks.post_forward(reduced[-1], self.forget)
        hooks.on_removal(use_ailurus_attention(attention_configs(reduced)))

    def remove(self) -> None:
        self.hooks.remove()

    # Hooks, in the order in which a forward meets them.

    def cluster(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        tokens, height, width = args[:3]
        # Plain numbers also where torch.compile would keep sizes symbolic.
        grid = (operator.index(height), operator.index(width))
        num_tokens = math.prod(grid)
        target = self.config.clusters_for(num_tokens)
        if target >= num_tokens:
            self.clusters[thread()] = None
            self.records[0].unreduced(num_tokens)
            return
        clusters = self.clustering(tokens, grid, target)
        self.clusters[thread()] = clusters
        self.records[0].reduced(num_tokens, clusters.num_clusters, clusters, grid)

    def enter_block(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        clusters = self.clusters[thread()]
        return args, kwargs if clusters is None else {**kwargs, CLUSTERS: clusters}

    def enter_attention(self, attention: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        clusters = kwargs.pop(CLUSTERS, None)
        if clusters is None:
            self.runs.pop(thread(), None)
            return args, kwargs
        self.runs[thread()] = StageRun(clusters, args[0])
        if attention.sequence_reduction_ratio == 1:
            bias = clusters.log_counts()[:, None, None, :].to(args[0].dtype)
            kwargs = {**kwargs, "attention_mask": bias}
        return (clusters.merge(args[0]), *args[1:]), kwargs

    def all_tokens(self, reduction: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        run = self.runs.get(thread())
        return args if run is None else (run.full, *args[1:]), kwargs

    def leave_attention(self, attention: nn.Module, args: tuple, output: tuple) -> tuple:
        run = self.runs.get(thread())
        if run is None:
            return output
        run.full = None
        return (run.clusters.unmerge(output[0]), *output[1:])

    def merge(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        run = self.runs.get(thread())
        return args if run is None else (run.clusters.merge(args[0]), *args[1:]), kwargs

    def unmerge(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        run = self.runs.get(thread())
        return args if run is None else (run.clusters.unmerge(args[0]), *args[1:]), kwargs

    def leave_convolution(self, convolution: nn.Module, args: tuple, output: Tensor) -> Tensor:
        run = self.runs.get(thread())
        return output if run is None else run.clusters.merge(output)

    def leave_mlp(self, mlp: nn.Module, args: tuple, output: Tensor) -> Tensor:
        run = self.runs.pop(thread(), None)
        return output if run is None else run.clusters.unmerge(output)

    def forget(self, block: nn.Module, args: tuple, output: Any) -> None:
        # Gradient checkpointing, which runs a block again later, hands it the clusters as an argument.
        self.clusters.pop(thread(), None)

    def locations(self) -> list[LocationStatus]:
        """What the last forward did, for the status table."""
        record, full, reduced = self.records[0], None, None
        if record.last_tokens is not None and record.last_clusters_count is not None:
            unreduced = [*self.blocks[: self.first], *self.blocks[self.last :]]
            outside = sum(block_flops(block, record.last_tokens, record.last_tokens) for block in unreduced)
            inside = self.blocks[self.first : self.last]
            full = outside + sum(block_flops(block, record.last_tokens, record.last_tokens) for block in inside)
            reduced = outside + sum(
                block_flops(block, record.last_tokens, record.last_clusters_count) for block in inside
            )
        where = f"{type(self.module).__name__} {self.number}"
        return [record.location_status(where, self.first, "in every layer (residual)", full, reduced)]


def block_flops(block: Any, num_tokens: int, num_clusters: int) -> float:
    """FLOPs of one block on one image whose queries and linear layers run on `num_clusters` of `num_tokens` tokens."""
    attention, mlp = block.attention, block.mlp
    width, hidden, ratio = attention.q_proj.in_features, mlp.fc1.out_features, attention.sequence_reduction_ratio
    num_keys = num_tokens // ratio**2 if ratio > 1 else num_clusters
    linear = num_clusters * (2 * width * width + 2 * width * hidden) + num_keys * 2 * width * width
    reduction = num_keys * ratio**2 * width * width if ratio > 1 else 0
    convolution = 9 * num_tokens * hidden
    return 2.0 * (linear + reduction + convolution + 2 * num_clusters * num_keys * width)


def stage_reducers(target: nn.Module, config: AiluRusConfig, clustering: ClusterFunction) -> list[StageReducer]:
    """A reducer for each stage that `config.stages` names, of every SegFormer in `target`; none where there is none."""
    lists = [m for m in target.modules() if isinstance(m, nn.ModuleList) and len(m) and qualified_name(m[0]) == STAGE]
    wanted = config.stages or DEFAULT_STAGES
    for stages in lists:
        if max(wanted) > len(stages):
            raise AiluRusError(
                f"stage {max(wanted)} is past the {len(stages)} stages of SegFormer: use 1 to {len(stages)}"
            )
    return [StageReducer(stages[number - 1], number, config, clustering) for stages in lists for number in wanted]
