"""JointProcessor: self-attention of transformers, joint with text or alone, whose image keys weigh their counts.

It stands in for the processors of SD3 and Flux (and, in wan.py, of Wan): diffusers' own give SD3 no mask, and Flux no
rotary embedding that differs from image to image. Where nothing is reduced it does what they do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..clusters import TokenClusters
from .backend import attend
from .calls import NetworkCall
from .grids import unbatched_ids
from .rebuildable import RebuildableProcessor
from .rotary import Rotary, rotated
from .token_order import TokenOrder


@dataclass(eq=False)
class JointReduction:
    """How one layer of attention is reduced.

    Args:
        clusters: of the image tokens.
        rotary: the embedding to use instead of the layer's, where its image tokens are representatives already; None:
            the layer gets all tokens, and merges keys and values after they were rotated.
        merges: whether the layer merges keys and values itself.
        merges_queries: whether it merges queries too, and unmerges what attention gives.
    """

    clusters: TokenClusters
    rotary: Rotary | None = None
    merges: bool = False
    merges_queries: bool = False


class JointSource(Protocol):
    """What a JointProcessor asks how a layer is reduced."""

    @property
    def token_order(self) -> TokenOrder: ...

    def reduction(self, layer: nn.Module, tokens: Tensor) -> JointReduction | None:
        """For a layer that gets Tensor[B, L, C]; None where it runs as it is."""


class JointProcessor(RebuildableProcessor):
    """Joint attention of SD3 and Flux on image tokens of which each stands for several."""

    # Where diffusers' set_attention_backend and context parallelism write to.
    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(self, source: JointSource) -> None:
        self.source = source

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
        grid: Any = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention as the layer calls it.

        Args:
            hidden_states: the image's, Tensor[B, L, C], or text and image together where encoder_hidden_states is None.
            grid: read at the start of a forward, and passed on to every layer by the network.
        """
        if image_rotary_emb is not None:
            image_rotary_emb = self._by_token(image_rotary_emb)
        order, reduction = self.source.token_order, self.source.reduction(attn, hidden_states)
        if reduction is not None and not reduction.merges:
            image_rotary_emb = reduction.rotary
        query, key, value = self._projected(attn, hidden_states, encoder_hidden_states)
        if image_rotary_emb is not None:
            query, key = rotated(query, image_rotary_emb), rotated(key, image_rotary_emb)
        bias = None
        if reduction is not None:
            attention_mask, clusters = None, reduction.clusters
            if reduction.merges:
                key, value = _merged(key, clusters, order), _merged(value, clusters, order)
                if reduction.merges_queries:
                    query = _merged(query, clusters, order)
            bias = order.key_bias(clusters, key.shape[1] - clusters.num_clusters)
        parts = (part.transpose(1, 2) for part in (query, key, value))
        out = attend(*parts, mask=attention_mask, key_bias=bias, backend=self._attention_backend)
        out = out.transpose(1, 2).flatten(2).to(query.dtype)
        if reduction is not None and reduction.merges_queries:
            of_text, of_image = order.split(out, reduction.clusters.num_clusters)
            out = order.join(of_text, reduction.clusters.unmerge(of_image))
        return self._output(attn, out, encoder_hidden_states)

    def _by_token(self, rotary: Rotary) -> Rotary:
        """The network's embedding as Tensor[1, N, D] twice: for subclasses whose network has another form."""
        return rotary

    def _projected(self, attn: Any, image: Tensor, text: Tensor | None) -> tuple[Tensor, ...]:
        """Query, key and value of all tokens in the network's order, Tensor[B, L, heads, D]."""
        parts = [part.unflatten(2, (attn.heads, -1)) for part in (attn.to_q(image), attn.to_k(image), attn.to_v(image))]
        norms = (attn.norm_q, attn.norm_k, None)
        parts = [part if norm is None else norm(part) for part, norm in zip(parts, norms)]
        if text is None:
            return tuple(parts)
        added = [
            part.unflatten(2, (attn.heads, -1))
            for part in (attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text))
        ]
        norms = (attn.norm_added_q, attn.norm_added_k, None)
        added = [part if norm is None else norm(part) for part, norm in zip(added, norms)]
        order = self.source.token_order
        return tuple(order.join(of_text, of_image) for of_text, of_image in zip(added, parts))

    def _output(self, attn: Any, out: Tensor, text: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        if text is None:
            # Flux's single blocks project later, together with the MLP.
            return out if getattr(attn, "pre_only", False) else attn.to_out[1](attn.to_out[0](out))
        of_text, of_image = self.source.token_order.split(out, out.shape[1] - text.shape[1])
        if not attn.context_pre_only:
            of_text = attn.to_add_out(of_text)
        return attn.to_out[1](attn.to_out[0](of_image)), of_text


def _merged(part: Tensor, clusters: TokenClusters, order: TokenOrder) -> Tensor:
    """Tensor[B, T + N, heads, D] with the image merged."""
    text, image = order.split(part, clusters.num_tokens)
    return order.join(text, clusters.merge(image.flatten(2)).unflatten(2, part.shape[2:]))


def rotary_of_ids(call: NetworkCall, clusters: TokenClusters, grid: tuple[int, ...]) -> Rotary:
    """Flux's own embedding of text tokens and of each cluster's mean row and column, Tensor[B, T + M, D] each."""
    batch = clusters.assignment.shape[0]
    text, image = unbatched_ids(call, "txt_ids").float(), unbatched_ids(call, "img_ids").float()
    means = clusters.merge(image.expand(batch, -1, -1))
    ids = torch.cat([text.expand(batch, -1, -1), means], 1)
    network: Any = call.network
    cos, sin = network.pos_embed(ids.flatten(0, 1))
    return cos.unflatten(0, ids.shape[:2]), sin.unflatten(0, ids.shape[:2])
