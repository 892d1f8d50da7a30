"""ACT (Zheng et al. 2021, arXiv:2011.09315): queries of equal hash share one attention row; keys and MLP stay whole.

Per head, a query's hash is that of `rounds` random projections, h = floor((a · q + b) / interval), joined as the digits
of a number of base 4 (section 3.2). Queries of one hash become their mean, the prototype; prototypes attend to all
keys; each query takes its prototype's result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ailurus_hf import TokenClusters
from ailurus_hf.errors import AiluRusError
from ailurus_hf.vision.backend import use_attention
from ailurus_hf.vision.discovery import FoundEncoder

from .hooks import Applied, Peer, attach

NAME = "benchmark_act"
BASE = 4


def hashes(query: Tensor, rounds: int, interval: float) -> Tensor:
    """Euclidean LSH of Tensor[..., N, D]: LongTensor[..., N]."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(query.shape[-1], rounds, generator=generator).to(query.device)
    offsets = torch.rand(rounds, generator=generator).to(query.device) * interval
    digits = ((query.float() @ directions + offsets) / interval).floor().long()
    return (digits * BASE ** torch.arange(rounds, device=query.device)).sum(-1)


def groups(codes: Tensor) -> TokenClusters:
    """One cluster for each code, numbered in order: LongTensor[B, N]. Rows with fewer codes get empty clusters."""
    ordered, order = codes.sort(dim=1)
    starts = torch.cat([torch.zeros_like(ordered[:, :1]), (ordered.diff(dim=1) != 0).long()], 1)
    number = starts.cumsum(1)
    assignment = torch.empty_like(number).scatter_(1, order, number)
    return TokenClusters.from_assignment(assignment, int(number.max()) + 1)


def clustered_attention(
    query: Tensor, key: Tensor, value: Tensor, rounds: int, interval: float, scale: float | None = None
) -> tuple[Tensor, float]:
    """Attention of prototypes, copied to their queries: Tensor[B, heads, N, D], and the mean share of rows computed."""
    batch, heads, count, width = query.shape
    clusters = groups(hashes(query, rounds, interval).flatten(0, 1))
    prototypes = clusters.merge(query.flatten(0, 1)).view(batch, heads, -1, width)
    out = nn.functional.scaled_dot_product_attention(prototypes, key, value, scale=scale)
    return clusters.unmerge(out.flatten(0, 1)).view(batch, heads, count, width), clusters.num_clusters / count


def act_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention for transformers; modules that no ACT is on go to SDPA."""
    peer = vars(module).get("_act")
    if peer is None:
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return result
    out, share = clustered_attention(query, key, value, peer.rounds, peer.interval, scaling)
    peer.shares.append(share)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, act_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


class ACT(Peer):
    """rounds: L of the paper, 8 to 32 there. interval: width of a hash's buckets, to the queries' own scale."""

    def __init__(self, found: FoundEncoder, rounds: int = 24, interval: float = 8.0) -> None:
        super().__init__(found)
        if not 1 <= rounds <= 32 or interval <= 0:  # more digits of base 4 than 32 do not fit into 64 bits
            raise AiluRusError(f"rounds must be 1 to 32 and interval above 0, got {rounds} and {interval}")
        self.rounds, self.interval = rounds, interval
        # Of the last forward: rows of attention computed in each layer, as a share.
        self.shares: list[float] = []

    def add_hooks(self) -> None:
        self.modules = [
            m
            for layer in self.layers
            for m in layer.modules()
            if {"q_proj", "k_proj"} <= dict(m.named_children()).keys()
        ]
        for module in self.modules:
            vars(module)["_act"] = self

    def install(self) -> None:
        super().install()
        use_attention(self.hooks, self.layers, name=NAME)

    def remove(self) -> None:
        for module in getattr(self, "modules", []):
            vars(module).pop("_act", None)
        super().remove()

    def begin(self) -> None:
        self.shares = []


def apply(model: nn.Module, **settings: Any) -> Applied:
    """ACT on a transformers model; settings as of `ACT`."""
    return attach(model, ACT, **settings)
