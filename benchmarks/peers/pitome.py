"""PiToMe (Tran et al. 2024, arXiv:2405.16148): every layer merges tokens that have many alike, and protects the rest.

From the paper's abstract and its authors' code (github.com/hchautran/PiToMe, `algo/pitome`, read and not copied): a
token's energy is the mean over all tokens of f(cosine of their keys averaged over heads), f(x) = x - m from the margin
m on and exp(x - m) - 1 below it; m falls from layer to layer, 0.75 (1 - layer / depth). Tokens in order of energy are
split in two by turns. In the second half of the layers only the 2r of most energy take part: each of the first set goes
to the most alike of the second. In the first half, as in that code's image classifiers, all take part and the r
strongest edges are merged; `protect_from=0` protects in every layer. r = floor(L - keep L). Means are weighted by size.

Decided here: merges are between attention and MLP and prefix tokens take no part, as there; attention is proportional
to size, as in ToMe (`proportional`); tokens stay in the order of the grid, which changes nothing in a layer; for dense
heads each cell takes the value of the token that holds it.
"""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ailurus_hf.errors import AiluRusError
from ailurus_hf.vision.discovery import FoundEncoder

from .by_keys import MergesByKeys
from .hooks import Applied, attach
from .leaders import each_its_own, means_by_size, numbered

MARGIN = 0.75


def energies(cosines: Tensor, margin: float) -> Tensor:
    """How many tokens are like each, softly: cosines Tensor[B, L, L] to [B, L]."""
    return F.elu(cosines - margin).mean(-1)


def match_by_energy(metric: Tensor, r: int, margin: float, protect: bool) -> Tensor:
    """The leader of each token, r of which go to another: Tensor[B, L, D] to LongTensor[B, L]."""
    unit = F.normalize(metric.float(), dim=-1)
    cosines = unit @ unit.transpose(1, 2)
    order = energies(cosines, margin).argsort(dim=1, descending=True, stable=True)
    if protect:
        order = order[:, : 2 * r]
    first, second = order[:, ::2], order[:, 1::2]
    between = cosines.gather(1, first[..., None].expand(-1, -1, cosines.shape[2]))
    best, target = between.gather(2, second[:, None].expand(-1, first.shape[1], -1)).max(-1)
    strongest = best.argsort(dim=1, descending=True, stable=True)[:, :r]
    goes, to = first.gather(1, strongest), second.gather(1, target.gather(1, strongest))
    return each_its_own(metric).scatter(1, goes, to)


class PiToMe(MergesByKeys):
    """keep: share of the tokens that every layer leaves, from a half on. protect_from: the first layer that protects
    (0 is the first; default: of the second half). proportional: attention weighted by size."""

    def __init__(
        self,
        found: FoundEncoder,
        keep: float = 0.9,
        protect_from: int | None = None,
        proportional: bool = True,
        restore_at: str = "backbone",
    ) -> None:
        super().__init__(found, restore_at)
        depth = len(self.layers)
        if not 0.5 <= keep <= 1:
            raise AiluRusError(f"keep must be 0.5 to 1, got {keep}")
        self.keep, self.proportional = keep, proportional
        self.protect_from = math.ceil(depth / 2) if protect_from is None else protect_from

    def merge(self, sequence: Tensor, index: int) -> Tensor:
        prefix, tokens = self.split(sequence)
        length = tokens.shape[1]
        r = math.floor(length - length * self.keep)
        if r == 0:
            return sequence
        margin = MARGIN * (1 - index / len(self.layers))
        to = numbered(match_by_energy(self.mean_keys(index), r, margin, protect=index >= self.protect_from))
        return self.merged(prefix, *means_by_size(tokens, self.sizes_of(tokens), to, length - r), to)


def apply(model: nn.Module, **settings: Any) -> Applied:
    """PiToMe on a transformers model; settings as of `PiToMe`."""
    return attach(model, PiToMe, **settings)
