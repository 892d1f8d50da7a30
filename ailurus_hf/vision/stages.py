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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..clustering import ClusterFunction
from ..clusters import TokenClusters
from ..config import AiluRusConfig
from ..errors import AiluRusError
from ..per_thread import PerThread
from ..status import LocationStatus
from .backend import use_attention
from .base import JoinFunction, Reducer, refuse_tracing
from .recompute import Recompute, may_run_again
from .registry import qualified_name

STAGE = "transformers.models.segformer.modeling_segformer.SegformerStage"
# The stage that holds most of a model's layers; benchmarks/families_speed.py measures the others beside it.
DEFAULT_STAGES = (3,)
# What a block hands on to its attention, where gradient checkpointing finds it again when it recomputes the block.
CLUSTERS = "ailurus_clusters"


@dataclass(eq=False)
class StageState:
    """What one forward of a stage keeps. clusters: None before the first reduced block, and if nothing is reduced."""

    clusters: TokenClusters | None = None


@dataclass(eq=False)
class BlockState:
    """What one forward of a block keeps. full: the tokens of its attention, while that runs."""

    clusters: TokenClusters
    full: Tensor | None = None


class StageReducer(Reducer):
    """Hooks on one stage of SegFormer.

    Args:
        stage: the stage.
        number: 1 for the first stage of the model.
        config, clustering: as in `Reducer.find`.

    Raises:
        AiluRusError: the settings do not fit.
    """

    per_forward = ("states", "blocks_states")

    def __init__(self, stage: Any, number: int, config: AiluRusConfig, clustering: ClusterFunction) -> None:
        super().__init__(stage, config, clustering)
        self.blocks, self.number = stage.blocks, number
        depth = len(self.blocks)
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
                f"stage {number} of SegFormer has {depth} layers: cluster_location has to be 0 to {depth - 1} and "
                f"restore_location at most {depth}, got {self.first} and {config.restore_location}"
            )
        self.states: PerThread[StageState] = PerThread()
        self.blocks_states: PerThread[BlockState] = PerThread()
        self.recompute: Recompute[StageState] = Recompute()

    @classmethod
    def find(
        cls, target: nn.Module, config: AiluRusConfig, clustering: ClusterFunction, join: JoinFunction
    ) -> Sequence[StageReducer]:
        """One for each stage that `config.stages` names, of every SegFormer in `target`; none where there is none."""
        lists = [
            module
            for module in target.modules()
            if isinstance(module, nn.ModuleList) and len(module) and qualified_name(module[0]) == STAGE
        ]
        wanted = config.stages or DEFAULT_STAGES
        for stages in lists:
            if max(wanted) > len(stages):
                raise AiluRusError(
                    f"stage {max(wanted)} is past the {len(stages)} stages of SegFormer: use 1 to {len(stages)}"
                )
        return [cls(stages[number - 1], number, config, clustering) for stages in lists for number in wanted]

    def put_hooks(self) -> None:
        reduced = list(self.blocks[self.first : self.last])
        hooks = self.hooks
        hooks.pre_forward(self.module, self.begin)
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
            hooks.post_forward(block, self.forget_block, always_call=True)
        hooks.post_forward(self.module, self.forget, always_call=True)
        use_attention(hooks, reduced)

    # Hooks, in the order in which a forward meets them.

    def begin(self, stage: nn.Module, args: tuple, kwargs: dict) -> None:
        refuse_tracing(stage)
        self.states.set(StageState())

    def cluster(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        state = self.states.get()
        if state is None:  # a checkpoint runs the block again
            return
        tokens, height, width = args[:3]
        # Plain numbers also where torch.compile would keep sizes symbolic.
        grid = (operator.index(height), operator.index(width))
        num_tokens = math.prod(grid)
        target = self.config.clusters_for(num_tokens)
        if target >= num_tokens:
            self.records[0].unreduced(num_tokens)
            return
        state.clusters = self.clustering(tokens, grid, target)
        self.records[0].reduced(num_tokens, state.clusters.num_clusters, state.clusters, grid)

    def enter_block(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        state = self.states.get()
        if state is None:
            state = self.recompute.find(args[0])
        elif may_run_again(args[0]):
            self.recompute.keep(args[0], state)
        if state is None:
            raise AiluRusError(
                f"{type(block).__name__} was called outside of a forward of stage {self.number} of SegFormer, so "
                "nothing says how its tokens are clustered: call the whole model, or switch off with remove_ailurus"
            )
        return args, kwargs if state.clusters is None else {**kwargs, CLUSTERS: state.clusters}

    def enter_attention(self, attention: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs = dict(kwargs)
        clusters = kwargs.pop(CLUSTERS, None)
        if clusters is None:
            return args, kwargs
        self.blocks_states.set(BlockState(clusters, args[0]))
        if attention.sequence_reduction_ratio == 1:
            bias = clusters.log_counts()[:, None, None, :].to(args[0].dtype)
            kwargs["attention_mask"] = bias
        return (clusters.merge(args[0]), *args[1:]), kwargs

    def all_tokens(self, reduction: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        state = self.blocks_states.get()
        return args if state is None else (state.full, *args[1:]), kwargs

    def leave_attention(self, attention: nn.Module, args: tuple, output: tuple) -> tuple:
        state = self.blocks_states.get()
        if state is None:
            return output
        state.full = None
        return (state.clusters.unmerge(output[0]), *output[1:])

    def merge(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        state = self.blocks_states.get()
        return args if state is None else (state.clusters.merge(args[0]), *args[1:]), kwargs

    def unmerge(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        state = self.blocks_states.get()
        return args if state is None else (state.clusters.unmerge(args[0]), *args[1:]), kwargs

    def leave_convolution(self, convolution: nn.Module, args: tuple, output: Tensor) -> Tensor:
        state = self.blocks_states.get()
        return output if state is None else state.clusters.merge(output)

    def leave_mlp(self, mlp: nn.Module, args: tuple, output: Tensor) -> Tensor:
        state = self.blocks_states.pop()
        return output if state is None else state.clusters.unmerge(output)

    def forget_block(self, block: nn.Module, args: tuple, output: Any) -> None:
        self.blocks_states.pop()

    def status(self) -> list[LocationStatus]:
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
