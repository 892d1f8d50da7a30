"""AiluRusProcessor: a diffusers attention processor that runs self-attention on representatives.

    pipe.unet.set_attn_processor(AiluRusProcessor(keep_ratio=0.5))

One instance serves all layers. Alone it clusters in every layer; `apply_ailurus` with scope="attention" makes one that
shares assignments.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..choices import Largest
from ..clustering.compiled import clustering_of
from ..config import AiluRusDiffusionConfig
from ..config_base import refuse_moved_fields
from ..errors import AiluRusError, UnsupportedModelError
from ..status import Record
from .backend import attend, has_attention_of_its_own, is_attention
from .calls import calling_block, running_network
from .cluster_tokens import cluster_tokens
from .frames import Clusters
from .rebuildable import RebuildableProcessor

log = logging.getLogger(__name__)


class Assigned(NamedTuple):
    """What a layer of self-attention runs on: clusters of keys and values, and of queries, None where all ask."""

    clusters: Clusters
    queries: Clusters | None


class ClusterSource(Protocol):
    """What an AiluRusProcessor asks for clusters."""

    @property
    def config(self) -> AiluRusDiffusionConfig: ...

    def assigned(self, layer: nn.Module, tokens: Tensor) -> Assigned | None:
        """For a layer that gets Tensor[B, N, C]; None where it runs unreduced."""


class OwnClusters:
    """The clusters of a layer's tokens from nothing but themselves.

    Args:
        config: the settings.
        grid: (H, W) of the latents; None: grids are square.
    """

    def __init__(self, config: AiluRusDiffusionConfig, grid: tuple[int, int] | None) -> None:
        self.config, self.grid = config, grid
        self.records: WeakKeyDictionary[nn.Module, Record] = WeakKeyDictionary()
        self._reduced = self._warned = False
        self.clustering = partial(clustering_of(config), check_finite=config.check_finite)

    def __reduce__(self) -> tuple:
        # Records are of the layers of this network, and not of a copy's.
        return OwnClusters, (self.config, self.grid)

    def assigned(self, layer: nn.Module, tokens: Tensor) -> Assigned | None:
        if layer not in self.records and not torch.compiler.is_compiling():
            _refuse_other_blocks(layer)
        num_tokens = tokens.shape[1]
        num_clusters = self.config.clusters_for(num_tokens, level=1)
        if num_clusters == num_tokens:
            if not torch.compiler.is_compiling():
                self._note_unreduced(layer, num_tokens)
            return None
        grid = self.grid_of(num_tokens)
        clusters = cluster_tokens(self.clustering, tokens, grid, num_clusters)
        if not torch.compiler.is_compiling():
            self._reduced = True
            self.records.setdefault(layer, Record()).reduced(num_tokens, num_clusters, clusters, grid)
        num_queries = self.config.queries_for(num_tokens, 1, num_clusters)
        if num_queries in (num_clusters, num_tokens):
            return Assigned(clusters, clusters if num_queries == num_clusters else None)
        return Assigned(clusters, cluster_tokens(self.clustering, tokens, grid, num_queries))

    def _note_unreduced(self, layer: nn.Module, num_tokens: int) -> None:
        self.records.setdefault(layer, Record()).unreduced(num_tokens)
        # The first layers of a network are those of its largest grid.
        if not self._reduced and not self._warned and self.config.keep_ratio != 1:
            self._warned = True
            log.warning(
                "AiluRusProcessor: self-attention of %d tokens runs on all of them, as min_tokens=%d",
                num_tokens,
                self.config.min_tokens,
            )

    def grid_of(self, num_tokens: int) -> tuple[int, int]:
        """The grid of so many tokens."""
        if self.grid is None:
            side = math.isqrt(num_tokens)
            if side * side != num_tokens:
                raise AiluRusError(
                    f"{num_tokens} tokens are no square: give grid=(H, W) of the latents, or use apply_ailurus"
                )
            return side, side
        grid = self.grid
        while math.prod(grid) > num_tokens:
            grid = (-(-grid[0] // 2), -(-grid[1] // 2))
        if math.prod(grid) != num_tokens:
            raise AiluRusError(f"no level of latents of {self.grid} has {num_tokens} tokens: give their grid=(H, W)")
        return grid


class Shares(Protocol):
    """The reducer of a network, as a processor knows it."""

    @property
    def config(self) -> AiluRusDiffusionConfig: ...

    def assigned(self, tokens: Tensor) -> Assigned | None:
        """For a layer of the stack that is running."""


@dataclass(eq=False)
class SharedClusters:
    """Where an AiluRusProcessor of `apply_ailurus` gets its clusters: those of the stack that is running."""

    reducer: Shares

    @property
    def config(self) -> AiluRusDiffusionConfig:
        return self.reducer.config

    def assigned(self, layer: nn.Module, tokens: Tensor) -> Assigned | None:
        return self.reducer.assigned(tokens)


def _checked(grid: Any) -> tuple[int, int]:
    sides = tuple(grid) if isinstance(grid, Sequence) else ()
    if len(sides) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in sides):
        raise AiluRusError(f"grid must be (H, W) with whole sides of at least 1, got {grid!r}")
    return sides[0], sides[1]


def _refuse_other_kinds(layer: Any, text: Any, rotary: tuple) -> None:
    """Raises UnsupportedModelError on a layer whose attention the processor would change in other ways, too."""
    if not is_attention(layer):
        reason = f"{type(layer).__name__} is no Attention of diffusers' UNets"
    elif layer.added_kv_proj_dim is not None:
        reason = "its attention is over image and added text keys at once"
    elif any(part is not None for part in rotary):
        reason = "its attention has rotary embeddings"
    elif isinstance(text, tuple):
        raise UnsupportedModelError(
            "AiluRusProcessor knows no image prompts (IP-Adapter): set it on attn1 layers alone, attn2 needs its own"
        )
    elif text is not None and not layer.is_cross_attention:
        reason = "its attention is over image and text at once"
    else:
        return
    raise _misfit(reason)


def _refuse_other_blocks(layer: nn.Module) -> None:
    """Raises UnsupportedModelError where nothing says that the layer's attention is a plain one, as in Sana's blocks.

    Its own processor, which would say so, is gone. Other transformers than those of BasicTransformerBlocks have blocks
    and processors of their own.
    """
    block = calling_block(layer)
    if has_attention_of_its_own(block):
        raise _misfit(f"its {type(block).__name__} may have attention of its own kind")


def _misfit(reason: str) -> UnsupportedModelError:
    network = running_network()
    return UnsupportedModelError(
        f"AiluRusProcessor does not fit {'this network' if network is None else type(network).__name__}: {reason}. Use "
        "apply_ailurus, which refuses or knows it; AiluRusProcessor is for layers whose self-attention stands alone"
    )


class AiluRusProcessor(RebuildableProcessor):
    """Self-attention on M of N tokens, weighted by how many each stands for; cross-attention as it is.

    Args:
        keep_ratio: M = round(keep_ratio · N).
        grid: (H, W) of the latents; layers at half, a quarter, ... of it are known by their number of tokens, and one
            that fits none of them is an error. None: grids are square, and a number of tokens that is no square is an
            error.
        source: gives the clusters, instead of the settings here.
        config_fields: min_tokens, reduce, query_ratio, clustering, compile_clustering, check_finite, as in
            `AiluRusDiffusionConfig`.

    Raises:
        AiluRusError: a setting is wrong, or is one for each resolution, which a processor does not know.

    Example:
        pipe.unet.set_attn_processor(AiluRusProcessor(keep_ratio=0.5))
    """

    FIELDS = ("keep_ratio", "min_tokens", "reduce", "query_ratio", "clustering", "compile_clustering", "check_finite")
    # Where diffusers' set_attention_backend and context parallelism write to.
    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(
        self,
        keep_ratio: float | Mapping[int | Largest, float] = 0.5,
        grid: Sequence[int] | None = None,
        *,
        source: ClusterSource | None = None,
        **config_fields: Any,
    ) -> None:
        for name, value in {"keep_ratio": keep_ratio, "reduce": config_fields.get("reduce")}.items():
            if isinstance(value, Mapping):
                raise AiluRusError(f"a processor knows no resolutions: {name} must be one for all, got {value!r}")
        refuse_moved_fields(config_fields)
        unknown = sorted(set(config_fields) - set(self.FIELDS))
        if unknown:
            raise AiluRusError(f"AiluRusProcessor has no fields {unknown}; it has grid, {', '.join(self.FIELDS)}")
        if source is None:
            config = AiluRusDiffusionConfig(keep_ratio=keep_ratio, scope="attention", **config_fields)
            source = OwnClusters(config, None if grid is None else _checked(grid))
        self.source = source

    @property
    def config(self) -> AiluRusDiffusionConfig:
        """The settings that it runs with."""
        return self.source.config

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        image_rotary_emb: Any = None,
        rotary_emb: Any = None,
        query_rotary_emb: Any = None,
    ) -> Tensor:
        """Attention as the layer calls it.

        Args:
            hidden_states: Tensor[B, N, C] or [B, C, H, W]; the result has its shape.
            attention_mask: on self-attention, the layer runs on all tokens.

        Raises:
            UnsupportedModelError: the layer is of another kind: with rotary embeddings, or joint attention.
        """
        _refuse_other_kinds(attn, encoder_hidden_states, (image_rotary_emb, rotary_emb, query_rotary_emb))
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if residual.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        clusters, queries, asking, answering = None, None, hidden_states, encoder_hidden_states
        if answering is None:
            assigned = self.source.assigned(attn, hidden_states) if attention_mask is None else None
            answering = hidden_states
            if assigned is not None:
                clusters, queries = assigned
                answering = clusters.merge(hidden_states)
            if queries is not None:
                asking = answering if queries is clusters else queries.merge(hidden_states)
        elif attn.norm_cross:
            answering = attn.norm_encoder_hidden_states(answering)
        hidden_states = self._attention(attn, asking, answering, attention_mask, clusters)
        if queries is not None:
            hidden_states = queries.unmerge(hidden_states)

        if residual.ndim == 4:
            hidden_states = hidden_states.transpose(1, 2).reshape(residual.shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        scaled: Tensor = hidden_states / attn.rescale_output_factor
        return scaled

    def _attention(
        self,
        attn: Any,
        asking: Tensor,
        answering: Tensor,
        mask: Tensor | None,
        clusters: Clusters | None,
    ) -> Tensor:
        batch, keys = answering.shape[:2]
        query, key, value = self._projected(attn, asking, answering)
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, keys, batch).view(batch, attn.heads, -1, keys)
        bias = None if clusters is None else clusters.log_counts()
        out = attend(query, key, value, mask=mask, key_bias=bias, backend=self._attention_backend)
        return self._output(attn, out.to(query.dtype))

    def _projected(self, attn: Any, asking: Tensor, answering: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, Tensor[B, heads, L, D]."""
        query, key, value = (
            part.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for part in (attn.to_q(asking), attn.to_k(answering), attn.to_v(answering))
        )
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        return query, key, value

    def _output(self, attn: Any, out: Tensor) -> Tensor:
        """From Tensor[B, heads, L, D] to [B, L, C]."""
        projected: Tensor = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
        return projected
