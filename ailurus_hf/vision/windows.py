"""VitDet and SAM: the few layers of global attention on representatives; the others attend in windows and keep the
grid.

Before a global layer its tokens are clustered and merged, its attention runs on M with the counts and with the relative
positions of the clusters' centroids, its MLP on M; then each token adds what its representative gained. Nothing is
shared between global layers, which are far apart. These models' attention takes no bias, so a global layer is given its
own.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..clustering import ClusterFunction
from ..config import AiluRusConfig
from ..errors import AiluRusError
from ..per_thread import PerThread
from ..status import LocationStatus
from .backend import weights_in_place
from .base import JoinFunction, Reducer, refuse_stages, refuse_tracing
from .flops import layer_flops
from .forward_state import Reduction
from .registry import qualified_name

# The layers: the name of their attention, and whether their tokens are Tensor[B, C, H, W] (else [B, H, W, C]).
LAYERS = {
    "transformers.models.vitdet.modeling_vitdet.VitDetLayer": ("attention", True),
    "transformers.models.sam.modeling_sam.SamVisionLayer": ("attn", False),
    "transformers.models.sam_hq.modeling_sam_hq.SamHQVisionLayer": ("attn", False),
}


@dataclass(eq=False)
class LayerState:
    """What one forward of a global layer keeps. attended: whether its attention ran on representatives."""

    reduction: Reduction
    attended: bool = False


class GlobalLayerReducer(Reducer):
    """Hooks on one global layer.

    Args:
        layer: the layer.
        number: 1 for the first layer of the encoder.
        config, clustering: as in `Reducer.find`.

    Raises:
        AiluRusError: the layer cannot be reduced.
    """

    per_forward = ("states",)

    def __init__(self, layer: Any, number: int, config: AiluRusConfig, clustering: ClusterFunction) -> None:
        super().__init__(layer, config, clustering)
        self.number = number
        name, self.channels_first = LAYERS[qualified_name(layer)]
        self.attention = getattr(layer, name)
        self.states: PerThread[LayerState] = PerThread()
        if getattr(layer, "use_residual_block", False):
            raise AiluRusError(f"layer {number} ends in convolutions on the grid: it cannot be reduced")

    @classmethod
    def find(
        cls, target: nn.Module, config: AiluRusConfig, clustering: ClusterFunction, join: JoinFunction
    ) -> Sequence[GlobalLayerReducer]:
        """One for each global layer after the `cluster_location`-th layer of VitDet or SAM; may be empty."""
        lists = [
            module
            for module in target.modules()
            if isinstance(module, nn.ModuleList) and len(module) and qualified_name(module[0]) in LAYERS
        ]
        if lists:
            refuse_stages(target, config)
        if lists and (config.restore != "residual" or len(config.locations) > 1):
            raise AiluRusError(
                "windowed layers have all tokens, so one cluster_location and restore='residual' are needed, got "
                f"{config.cluster_location} and {config.restore!r}"
            )
        found = []
        for layers in lists:
            numbers = [n for n, layer in enumerate(layers, start=1) if layer.window_size == 0]
            last = config.restore_location or len(layers)
            chosen = [n for n in numbers if config.locations[0] < n <= last]
            if not chosen:
                raise AiluRusError(
                    f"layers {numbers} of {len(layers)} have global attention, none of which is after cluster_location "
                    f"{config.locations[0]} and at most restore_location {config.restore_location}"
                )
            found += [cls(layers[n - 1], n, config, clustering) for n in chosen]
        return found

    def put_hooks(self) -> None:
        self.hooks.pre_forward(self.module, self.enter)
        self.hooks.post_forward(self.module, self.leave, prepend=True)
        self.hooks.post_forward(self.module, self.forget, always_call=True)
        self.hooks.replace_method(self.attention, "forward", self.attend)

    def enter(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        refuse_tracing(layer)
        if layer.training and getattr(layer, "gradient_checkpointing", False):
            # It would call the layer again without hooks, and these layers hand nothing on to their attention.
            raise AiluRusError(f"gradient checkpointing of {type(layer).__name__} loses the clusters: switch it off")
        hidden = args[0]
        hidden = hidden.permute(0, 2, 3, 1) if self.channels_first else hidden
        # Plain numbers also where torch.compile would keep sizes symbolic.
        grid = tuple(operator.index(side) for side in hidden.shape[1:3])
        num_tokens = math.prod(grid)
        target = self.config.clusters_for(num_tokens)
        if target >= num_tokens:
            self.records[0].unreduced(num_tokens)
            return args, kwargs
        tokens = hidden.flatten(1, 2)
        clusters = self.clustering(tokens, grid, target)
        self.records[0].reduced(num_tokens, clusters.num_clusters, clusters, grid)
        reduction = Reduction(self.number - 1, grid, clusters, tokens, clusters.merge(tokens))
        self.states.set(LayerState(reduction))
        # A column of representatives, which the layer takes for a grid.
        merged = reduction.merged[:, :, None]
        return (merged.permute(0, 3, 1, 2) if self.channels_first else merged, *args[1:]), kwargs

    def attend(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Attention of representatives Tensor[B, M, 1, C], which count for their tokens; else the model's own."""
        state = self.states.get()
        if state is None:
            return original(*args, **kwargs)
        state.attended = True
        hidden, attention = args[0] if args else kwargs["hidden_states"], self.attention
        if kwargs.get("output_attentions"):
            raise AiluRusError("attention maps of global layers are not kept: call the model without output_attentions")
        heads = getattr(attention, "num_heads", None) or attention.num_attention_heads
        query, key, value = attention.qkv(hidden[:, :, 0]).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        bias = state.reduction.clusters.log_counts()[:, None, None].to(query.dtype)
        if hasattr(attention, "rel_pos_h"):
            with weights_in_place(attention):
                bias = bias + relative_scores(attention, query, state.reduction)
        dropout = getattr(attention, "dropout", 0.0) if attention.training else 0.0
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, dropout_p=dropout, scale=attention.scale
        )
        return attention.proj(out.transpose(1, 2).flatten(2))[:, :, None], None

    def leave(self, layer: nn.Module, args: tuple, output: Any) -> Any:
        state = self.states.pop()
        if state is None:
            return output
        if not state.attended:
            raise AiluRusError(
                f"the forward of {type(self.attention).__name__} was replaced since: call apply_ailurus again"
            )
        hidden = output[0] if isinstance(output, tuple) else output
        representatives = hidden[..., 0].transpose(1, 2) if self.channels_first else hidden[:, :, 0]
        tokens = state.reduction.unmerge(representatives, "residual").unflatten(1, state.reduction.grid)
        tokens = tokens.permute(0, 3, 1, 2) if self.channels_first else tokens
        return (tokens, *output[1:]) if isinstance(output, tuple) else tokens

    def status(self) -> list[LocationStatus]:
        record = self.records[0]
        tokens, count = record.last_tokens, record.last_clusters_count
        full = None if tokens is None else layer_flops(self.module, tokens)
        reduced = None if count is None else layer_flops(self.module, count)
        where = f"{type(self.module).__name__} {self.number}"
        return [record.location_status(where, self.number - 1, "after the layer (residual)", full, reduced)]


def relative_scores(attention: Any, query: Tensor, reduction: Reduction) -> Tensor:
    """What a query adds for how many rows and columns a key is away, between centroids: Tensor[B, heads, M, M]."""
    # A method of SAM's, a function beside VitDet's.
    owner = attention if hasattr(attention, "get_rel_pos") else sys.modules[type(attention).__module__]
    resized = owner.get_rel_pos
    centroids, total = reduction.centroids(), query.new_zeros(())
    for axis, side, table in zip((0, 1), reduction.grid, (attention.rel_pos_h, attention.rel_pos_w), strict=True):
        # Tensor[side, side, D] for every pair of rows, of which one row and one column hold all differences.
        pairs = resized(side, side, table)
        by_difference = torch.cat([pairs[0].flip(0), pairs[1:, 0]])
        along = centroids[..., axis]
        index = (along[:, :, None] - along[:, None]).round().long() + side - 1
        scores = query @ by_difference.transpose(0, 1).to(query.dtype)
        total = total + scores.gather(3, index[:, None].expand(-1, query.shape[1], -1, -1))
    return total
