"""JointProcessor: self-attention of transformers, joint with text or alone, whose image keys weigh their counts.

It stands in for the processors of SD3 and Flux (its subclasses, for those of other networks): diffusers' own give SD3
no mask, and Flux no rotary embedding that differs from image to image. Where nothing is reduced it does what they do.
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
from .rotary import Rotary, length, rotated
from .token_order import TokenOrder


@dataclass(eq=False)
class JointReduction:
    """How one layer of attention is reduced.

    Args:
        clusters: of the image tokens.
        order: of image and text tokens.
        rotary: the embedding to use instead of the layer's, where its image tokens are representatives already; None:
            the layer gets all tokens, and merges keys and values after they were rotated.
        merges: whether the layer merges keys and values itself.
        merges_queries: whether it merges queries too, and unmerges what attention gives.
    """

    clusters: TokenClusters
    order: TokenOrder
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
    """Joint attention of SD3 and Flux on image tokens of which each stands for several.

    Subclasses say in what the attention of their networks differs, and take the arguments that its layers give.
    They name this class where they call its methods: torch.compile takes super() for the same class again, as the class
    that a processor gets of its own equals the one that is written.
    """

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
        image_rotary_emb: Any = None,
        grid: Any = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention as the layer calls it.

        Args:
            hidden_states: the image's, Tensor[B, L, C], or text and image together where encoder_hidden_states is None.
            attention_mask: Tensor[B, L], or of four dimensions; it tells no image token from another.
            grid: read at the start of a forward, and passed on to every layer by the network.
        """
        rotary = None if image_rotary_emb is None else self.by_token(attn, image_rotary_emb)
        order, reduction = self.source.token_order, self.source.reduction(attn, hidden_states)
        if reduction is not None:
            order = reduction.order
            rotary = rotary if reduction.merges else reduction.rotary
        query, key, value, *others = self._projected(attn, hidden_states, encoder_hidden_states)
        if rotary is not None:
            query, key = self._rotated(query, rotary, order), self._rotated(key, rotary, order)
        mask = (
            attention_mask[:, None, None] if attention_mask is not None and attention_mask.ndim == 2 else attention_mask
        )
        if reduction is None:
            out = self._attended(query, key, value, mask, None)
        else:
            out = self._reduced(query, key, value, mask, reduction)
        return self._output(attn, out, encoder_hidden_states, *others)

    def _reduced(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, reduction: JointReduction
    ) -> Tensor:
        """Attention, Tensor[B, L, heads * D], on keys that weigh their counts."""
        clusters, order = reduction.clusters, reduction.order
        if reduction.merges:
            key, value = _merged(key, clusters, order), _merged(value, clusters, order)
            if reduction.merges_queries:
                query = _merged(query, clusters, order)
        bias = order.key_bias(clusters, key.shape[1] - clusters.num_clusters)
        if mask is not None:
            merges_queries = reduction.merges_queries or not reduction.merges
            mask = _biased_mask(mask, bias, clusters.num_clusters, order, merges_queries).to(query.dtype)
        out = self._attended(query, key, value, mask, bias if mask is None else None)
        if not reduction.merges_queries:
            return out
        of_text, of_image = order.split(out, clusters.num_clusters)
        return order.join(of_text, clusters.unmerge(of_image))

    def _attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
        parts = (part.transpose(1, 2) for part in (query, key, value))
        out = attend(*parts, mask=mask, key_bias=bias, backend=self._attention_backend)
        return out.transpose(1, 2).flatten(2).to(query.dtype)

    def by_token(self, attn: Any, embedding: Any) -> Rotary:
        """The rotary embedding as the network's blocks get it, by token: of all tokens, or of the image's alone."""
        cos, sin = embedding
        return cos, sin

    def _rotated(self, tokens: Tensor, rotary: Rotary, order: TokenOrder) -> Tensor:
        """Tensor[B, L, heads, D], of which text stays as it is where the embedding is of the image alone."""
        num_tokens = length(rotary)
        if num_tokens == tokens.shape[1]:
            return rotated(tokens, rotary)
        text, image = order.split(tokens, num_tokens)
        return order.join(text, rotated(image, rotary))

    def _projected(self, attn: Any, image: Tensor, text: Tensor | None) -> tuple[Tensor, ...]:
        """Query, key and value of all tokens in the network's order, Tensor[B, L, heads, D]; what follows, `_output`
        gets, too."""
        order = self.source.token_order
        if text is not None and not _projects_text(attn):
            image, text = order.join(text, image), None
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
        return tuple(order.join(of_text, of_image) for of_text, of_image in zip(added, parts))

    def _output(self, attn: Any, out: Tensor, text: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        # Single blocks project later, together with the MLP.
        projects = not getattr(attn, "pre_only", False)
        if text is None:
            return attn.to_out[1](attn.to_out[0](out)) if projects else out
        of_text, of_image = self.source.token_order.split(out, out.shape[1] - text.shape[1])
        if projects:
            of_image = attn.to_out[1](attn.to_out[0](of_image))
            if not _projects_text(attn):
                of_text = attn.to_out[1](attn.to_out[0](of_text))
        if getattr(attn, "to_add_out", None) is not None:
            of_text = attn.to_add_out(of_text)
        return of_image, of_text


def _projects_text(attn: Any) -> bool:
    """Whether a layer of joint attention has maps of its own for text tokens."""
    return getattr(attn, "add_q_proj", None) is not None


def _biased_mask(mask: Tensor, bias: Tensor, num_clusters: int, order: TokenOrder, merges_queries: bool) -> Tensor:
    """A mask for keys that are representatives, with their bias, Tensor[B, L_k].

    Args:
        mask: bool or added, [B or 1, heads or 1, L or 1, L]; the same for all image tokens.
    """
    num_text_tokens = bias.shape[1] - num_clusters
    if mask.dtype == torch.bool:
        mask = bias.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)

    def of_clusters(mask: Tensor, axis: int) -> Tensor:
        mask = mask.movedim(axis, 1)
        text, image = order.split(mask, mask.shape[1] - num_text_tokens)
        image = image[:, :1].expand(-1, num_clusters, *image.shape[2:])
        return order.join(text, image).movedim(1, axis)

    mask = of_clusters(mask, 3)
    if merges_queries and mask.shape[2] > 1:
        mask = of_clusters(mask, 2)
    return mask + bias[:, None, None, :]


def _merged(part: Tensor, clusters: TokenClusters, order: TokenOrder) -> Tensor:
    """Tensor[B, T + N, heads, D] with the image merged."""
    text, image = order.split(part, clusters.num_tokens)
    return order.join(text, clusters.merge(image.flatten(2)).unflatten(2, part.shape[2:]))


def rotary_of_ids(call: NetworkCall, clusters: TokenClusters, grid: tuple[int, ...]) -> Rotary:
    """Flux's own embedding of text tokens, of each cluster's mean row and column, and of the tokens of reference
    images, Tensor[B, T + M + R, D] each."""
    batch, num_tokens = clusters.assignment.shape
    text, image = unbatched_ids(call, "txt_ids").float(), unbatched_ids(call, "img_ids").float()
    means = clusters.merge(image[:num_tokens].expand(batch, -1, -1))
    text, references = (each.expand(batch, -1, -1) for each in (text, image[num_tokens:]))
    ids = torch.cat([text, means, references], 1)
    network: Any = call.network
    cos, sin = network.pos_embed(ids.flatten(0, 1))
    return cos.unflatten(0, ids.shape[:2]), sin.unflatten(0, ids.shape[:2])
