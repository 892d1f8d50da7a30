"""ToMe (Bolya et al. 2023, arXiv:2210.09461): every layer merges its r most alike pairs of tokens.

Tokens are split in two by turns; each of the first set draws one edge, to the most alike of the second set, by the
cosine of their keys averaged over heads; the r strongest edges are merged (section 3). Tokens keep the number of
patches they hold: means are weighted by it and attention is proportional to it (Eq. 1). Prefix tokens are never merged.
For dense heads each cell takes the value of the token that holds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ailurus_hf.clustering.rows import image_rows
from ailurus_hf.errors import AiluRusError
from ailurus_hf.vision.discovery import FoundEncoder

from .by_keys import MergesByKeys
from .hooks import Applied, attach


class Matching(NamedTuple):
    """kept, merged: LongTensor[B, .] tokens of the first set that stay and that go; into: where the latter go, as
    indices into the second set. to: LongTensor[B, L], each token's index in the new sequence (kept ones, then the
    second set)."""

    kept: Tensor
    merged: Tensor
    into: Tensor
    to: Tensor


def bipartite_matching(metric: Tensor, r: int) -> Matching:
    """Bipartite soft matching of Tensor[B, L, D] (section 3 and appendix D): the r best edges, at most half of L."""
    batch, length, _ = metric.shape
    unit = F.normalize(metric.float(), dim=-1)
    first, second = unit[:, 1::2], unit[:, 0::2]
    best, target = (first @ second.transpose(1, 2)).max(-1)
    order = best.argsort(dim=1, descending=True, stable=True)
    merged, kept = order[:, :r], order[:, r:].sort(dim=1).values
    into = target.gather(1, merged)
    to = torch.empty(batch, length, dtype=torch.long, device=metric.device)
    to[:, 0::2] = torch.arange(second.shape[1], device=metric.device) + kept.shape[1]
    of_first = torch.empty_like(order)
    of_first.scatter_(1, kept, torch.arange(kept.shape[1], device=metric.device).expand(batch, -1))
    of_first.scatter_(1, merged, into + kept.shape[1])
    to[:, 1::2] = of_first
    return Matching(kept, merged, into, to)


def merge_matched(tokens: Tensor, sizes: Tensor, matching: Matching) -> tuple[Tensor, Tensor]:
    """Size-weighted means: Tensor[B, L, C] and Tensor[B, L] to those of the new sequence."""
    first, second = tokens[:, 1::2], tokens[:, 0::2]
    first_sizes, second_sizes = sizes[:, 1::2], sizes[:, 0::2]
    merged_sizes = first_sizes.gather(1, matching.merged)
    new_sizes = second_sizes.scatter_add(1, matching.into, merged_sizes)
    into = matching.into[..., None].expand(-1, -1, tokens.shape[-1])
    weighted = image_rows(first, matching.merged) * merged_sizes[..., None].to(tokens.dtype)
    sums = (second * second_sizes[..., None].to(tokens.dtype)).scatter_add(1, into, weighted)
    means = sums / new_sizes[..., None].to(tokens.dtype)
    kept_sizes = first_sizes.gather(1, matching.kept)
    return torch.cat([image_rows(first, matching.kept), means], 1), torch.cat([kept_sizes, new_sizes], 1)


class ToMe(MergesByKeys):
    """r: pairs merged in every layer, or one number a layer. proportional: attention weighted by size (Eq. 1)."""

    def __init__(
        self, found: FoundEncoder, r: int | Sequence[int] = 8, proportional: bool = True, restore_at: str = "backbone"
    ) -> None:
        super().__init__(found, restore_at)
        depth = len(self.layers)
        self.r = [r] * depth if isinstance(r, int) else list(r)
        self.proportional = proportional
        if len(self.r) != depth or min(self.r) < 0:
            raise AiluRusError(f"r must be one number from 0 on, or {depth} of them, got {r}")

    def merges_in(self, index: int) -> bool:
        return self.r[index] > 0

    def merge(self, sequence: Tensor, index: int) -> Tensor:
        prefix, tokens = self.split(sequence)
        r = min(self.r[index], tokens.shape[1] // 2)
        if r == 0:
            return sequence
        matching = bipartite_matching(self.mean_keys(index), r)
        return self.merged(prefix, *merge_matched(tokens, self.sizes_of(tokens), matching), matching.to)


def apply(model: nn.Module, **settings: Any) -> Applied:
    """ToMe on a transformers model; settings as of `ToMe`."""
    return attach(model, ToMe, **settings)
