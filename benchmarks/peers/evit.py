"""EViT (Liang et al. 2022, arXiv:2202.07800): at a few layers, keep the tokens that CLS attends to and fuse the rest.

Between attention and MLP the ceil(keep · L) tokens of the largest CLS attention (mean over heads) stay, and the others
become one token, their sum weighted by that attention (section 3.2). The paper's are layers 4, 7 and 10.
A dense head needs all tokens: a dropped one keeps the value it had when dropped (restore="last"), or takes that of the
fused token (restore="fused").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ailurus_hf.clustering.rows import image_rows
from ailurus_hf.errors import AiluRusError, UnsupportedModelError
from ailurus_hf.vision.discovery import FoundEncoder

from .hooks import Applied, Peer, attach, copy_back


def cls_attention(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """Attention of the first token to all, mean over heads: projections Tensor[B, L, C] twice to [B, L]."""
    query, key = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (query[:, :1], key))
    logits = (query @ key.transpose(2, 3)).float() * query.shape[-1] ** -0.5
    return logits.softmax(-1)[:, :, 0].mean(1)


class EViT(Peer):
    """keep: share of the tokens that stay at each of `locations` (0: the first layer; default: the paper's)."""

    def __init__(
        self,
        found: FoundEncoder,
        keep: float = 0.7,
        locations: Sequence[int] | None = None,
        restore: str = "last",
        restore_at: str = "backbone",
    ) -> None:
        super().__init__(found, restore_at)
        depth = len(self.layers)
        self.keep, self.restore = keep, restore
        self.locations = [depth // 4, depth // 2, 3 * depth // 4] if locations is None else list(locations)
        if not 0 < keep <= 1:
            raise AiluRusError(f"keep must be above 0 and at most 1, got {keep}")
        if restore not in ("last", "fused"):
            raise AiluRusError(f"restore must be 'last' or 'fused', got {restore!r}")
        if restore == "last" and self.through_decoder:
            raise AiluRusError("a decoder on fewer tokens has no last values to restore: use restore='fused'")
        if self.prefix == 0:
            raise UnsupportedModelError(f"{type(found.encoder).__name__} has no CLS token to tell what matters")

    def add_hooks(self) -> None:
        self.queries, self.keys = {}, {}
        for index in sorted(set(self.locations)):
            self.queries[index], self.keys[index] = self.watch(index, "q_proj"), self.watch(index, "k_proj")
            self.merge_inside(index, self.merge)

    def begin(self) -> None:
        # For "fused", which token holds each cell's value; for "last", the cell of each token (N: none) and older
        # values.
        self.source: Tensor | None = None
        self.cells: Tensor | None = None
        self.values: Tensor | None = None

    def merge(self, sequence: Tensor, index: int) -> Tensor:
        prefix, tokens = self.split(sequence)
        length = tokens.shape[1]
        count = math.ceil(self.keep * length)
        if count == length:
            return sequence
        heads = self.found.encoder.config.num_attention_heads
        attention = cls_attention(self.queries[index]["output"], self.keys[index]["output"], heads)[:, self.prefix :]
        order = attention.argsort(dim=1, descending=True, stable=True)
        kept, dropped = order[:, :count], order[:, count:]
        rest = image_rows(tokens, dropped)
        weights = attention.gather(1, dropped)[..., None].to(tokens.dtype)
        fused = (rest * weights).sum(1, keepdim=True)
        if self.restore == "fused":
            self._track(kept, dropped)
        else:
            self._store(kept, dropped, rest)
        return torch.cat([prefix, image_rows(tokens, kept), fused], 1)

    def _track(self, kept: Tensor, dropped: Tensor) -> None:
        count = kept.shape[1]
        to = torch.full((kept.shape[0], count + dropped.shape[1]), count, device=kept.device)
        to.scatter_(1, kept, torch.arange(count, device=kept.device).expand_as(kept))
        self.source = to if self.source is None else to.gather(1, self.source)
        self.unmerge = copy_back(self.source)

    def _store(self, kept: Tensor, dropped: Tensor, rest: Tensor) -> None:
        batch, channels = rest.shape[0], rest.shape[2]
        if self.cells is None or self.values is None:
            self.cells = torch.arange(self.num_tokens, device=rest.device).expand(batch, -1)
            # One row more, for fused tokens.
            self.values = rest.new_zeros(batch, self.num_tokens + 1, channels)
        self.values = _put(self.values, self.cells.gather(1, dropped), rest)
        nowhere = torch.full((batch, 1), self.num_tokens, device=rest.device)
        self.cells = torch.cat([self.cells.gather(1, kept), nowhere], 1)
        values, cells = self.values, self.cells
        self.unmerge = lambda tokens: _put(values, cells, tokens)[:, :-1]


def _put(values: Tensor, cells: Tensor, tokens: Tensor) -> Tensor:
    return values.scatter(1, cells[..., None].expand(-1, -1, tokens.shape[-1]), tokens)


def apply(model: nn.Module, **settings: Any) -> Applied:
    """EViT on a transformers model; settings as of `EViT`."""
    return attach(model, EViT, **settings)
