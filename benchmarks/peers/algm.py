"""ALGM (Norouzi et al. 2024, arXiv:2406.09936): merge alike neighbors in the first layer, alike tokens anywhere later.

Both between attention and MLP. CLAP: a 2 x 2 window whose mean pair cosine exceeds a threshold becomes its mean. GBM:
ToMe's bipartite matching in a middle layer (the 5th of 12), all edges above a threshold. The threshold is the mean plus
one standard deviation of the cosines of token pairs. The paper takes it once over the training set (`calibrate`); left
out, each image's own pairs are taken. Images merge to different lengths, so in a batch the shorter are padded with keys
of no weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ailurus_hf.errors import AiluRusError
from ailurus_hf.vision.discovery import FoundEncoder

from .hooks import Applied, Peer, attach, copy_back
from .leaders import each_its_own, means_by_size, numbered

WINDOW = 2


def pair_cosines(tokens: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the cosine over pairs of different tokens: Tensor[B, L, C] to [B] twice.

    present: Tensor[B, L], 1 for tokens and 0 for padding. From sums over tokens, so that no L x L table is made.
    """
    unit = F.normalize(tokens.float(), dim=-1) * present[..., None]
    count = present.sum(1)
    pairs = (count * (count - 1)).clamp(min=1)
    mean = (unit.sum(1).square().sum(-1) - count) / pairs
    square = ((unit.transpose(1, 2) @ unit).square().sum((1, 2)) - count) / pairs
    return mean, (square - mean.square()).clamp(min=0).sqrt()


def window_cosines(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean cosine of the six pairs in each whole 2 x 2 window: Tensor[B, N, C] to [B, H // 2, W // 2]."""
    unit = F.normalize(tokens.float(), dim=-1).unflatten(1, grid)
    unit = unit[:, : grid[0] // WINDOW * WINDOW, : grid[1] // WINDOW * WINDOW]
    total = unit.unflatten(2, (-1, WINDOW)).unflatten(1, (-1, WINDOW)).sum((2, 4))
    size = WINDOW**2
    return (total.square().sum(-1) - size) / (size * (size - 1))


def merge_windows(chosen: Tensor, grid: tuple[int, int]) -> Tensor:
    """The cluster of each cell, chosen windows being one cluster each: BoolTensor[B, H // 2, W // 2] to [B, N]."""
    cells = torch.arange(grid[0] * grid[1], device=chosen.device).view(grid)
    leader = cells.clone().expand(chosen.shape[0], -1, -1).clone()
    height, width = (side // WINDOW * WINDOW for side in grid)
    corner = cells[:height:WINDOW, :width:WINDOW]
    inside = leader[:, :height, :width]
    spread = corner.repeat_interleave(WINDOW, 0).repeat_interleave(WINDOW, 1)
    merged = chosen.repeat_interleave(WINDOW, 1).repeat_interleave(WINDOW, 2)
    leader[:, :height, :width] = torch.where(merged, spread, inside)
    return numbered(leader.flatten(1))


def match_above(tokens: Tensor, present: Tensor, threshold: Tensor) -> Tensor:
    """Clusters of a bipartite matching in which every edge above the threshold is merged: Tensor[B, L, C] to [B, L]."""
    unit = F.normalize(tokens.float(), dim=-1)
    first, second = unit[:, 1::2], unit[:, 0::2]
    cosine = first @ second.transpose(1, 2)
    cosine = cosine.masked_fill(present[:, None, 0::2] == 0, -torch.inf)
    best, target = cosine.max(-1)
    leader = each_its_own(tokens)
    merged = (best > threshold[:, None]) & (present[:, 1::2] > 0)
    leader[:, 1::2] = torch.where(merged, 2 * target, leader[:, 1::2])
    return numbered(leader)


class ALGM(Peer):
    """local, middle: the layers (0 is the first). sigmas: how many standard deviations above the mean the thresholds
    lie; thresholds: two fixed ones instead. proportional: attention weighted by size, as in ToMe."""

    def __init__(
        self,
        found: FoundEncoder,
        local: int = 0,
        middle: int | None = None,
        sigmas: float = 1.0,
        thresholds: tuple[float, float] | None = None,
        proportional: bool = True,
        restore_at: str = "decoder",
    ) -> None:
        super().__init__(found, restore_at)
        depth = len(self.layers)
        # The 5th layer of 12.
        self.local, self.middle = local, max(local + 1, round(5 / 12 * depth) - 1) if middle is None else middle
        self.sigmas, self.thresholds, self.proportional = sigmas, thresholds, proportional
        if not 0 <= self.local < self.middle < depth:
            raise AiluRusError(f"local and middle must rise from 0 to {depth - 1}, got {self.local} and {self.middle}")

    def add_hooks(self) -> None:
        self.merge_inside(self.local, self.merge)
        self.merge_inside(self.middle, self.merge)

    def begin(self) -> None:
        self.sizes: Tensor | None = None
        self.source: Tensor | None = None
        # Mean and deviation that each layer's images had, for `calibrate`.
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def merge(self, sequence: Tensor, index: int) -> Tensor:
        prefix, tokens = self.split(sequence)
        sizes = torch.ones(tokens.shape[:2], device=tokens.device) if self.sizes is None else self.sizes
        present = (sizes > 0).float()
        threshold = self._threshold(tokens, present, index)
        if index == self.local:
            assignment = merge_windows(window_cosines(tokens, self.grid) > threshold[:, None, None], self.grid)
        else:
            assignment = match_above(tokens, present, threshold)
        if (assignment == torch.arange(tokens.shape[1], device=tokens.device)).all():
            return sequence
        # Padding follows the tokens and has no weight. What even the longest image has of it is cut off.
        count = int((assignment + 1).mul(present.long()).max())
        assignment = assignment.clamp(max=count - 1)
        merged, self.sizes = means_by_size(tokens, sizes, assignment, count)
        self.source = assignment if self.source is None else assignment.gather(1, self.source)
        self.unmerge = copy_back(self.source)
        padded = bool((self.sizes == 0).any())
        self.bias = self.sizes.log() if self.proportional else self.sizes.clamp(max=1).log() if padded else None
        return torch.cat([prefix, merged], 1)

    def _threshold(self, tokens: Tensor, present: Tensor, index: int) -> Tensor:
        if self.thresholds is not None:
            fixed = self.thresholds[0 if index == self.local else 1]
            return torch.full((tokens.shape[0],), fixed, device=tokens.device)
        mean, deviation = self.seen[index] = pair_cosines(tokens, present)
        return mean + self.sigmas * deviation


@torch.no_grad()
def calibrate(
    model: nn.Module, inputs: Iterable[dict[str, Any]], sigmas: float = 1.0, **settings: Any
) -> tuple[float, float]:
    """The two thresholds from a model's inputs: mean plus `sigmas` deviations, averaged over images."""
    found: dict[int, list[Tensor]] = {}
    # Nothing is above a cosine of 1, so that the statistics are those of the plain model.
    with attach(model, ALGM, sigmas=1e9, **settings) as applied:
        for arguments in inputs:
            model(**arguments)
            for index, (mean, deviation) in applied.peers[0].seen.items():
                found.setdefault(index, []).append(mean + sigmas * deviation)
    local, middle = (torch.cat(found[index]).mean().item() for index in sorted(found))
    return local, middle


def apply(model: nn.Module, **settings: Any) -> Applied:
    """ALGM on a transformers model; settings as of `ALGM`."""
    return attach(model, ALGM, **settings)
