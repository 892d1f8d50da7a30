"""CubistMerge (Gong and Lis 2025, arXiv:2509.21764): once, every row and then every column merges as many neighbors.

From the paper's abstract and its authors' code (the forks of ToMe and DINOv3 that its README files call CubistMerge,
read and not copied): along a line, each token of odd place may go to the more alike (cosine) of the two beside it; the
r strongest edges of the line are merged, so that an H x W grid becomes a whole one of (H - r) x (W - s) and neighbors
stay in order. What is merged is, in each dimension, the value of largest magnitude. Dense heads get every merged
token's value copied back to its cells, columns first.

Decided here: the cosine is of the tokens that leave layer L (`location`); where a line must lose more than half,
rows and columns take turns once more in the same place; attention is not weighted, since tokens are no means; a
decoder on tokens runs on the fewer ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ailurus_hf.vision.discovery import FoundEncoder

from .hooks import Applied, Peer, attach, copy_back, two_cells
from .leaders import each_its_own, numbered


def match_beside(lines: Tensor, r: int) -> Tensor:
    """The place of each token on a line that loses r of them: Tensor[B, L, C] to LongTensor[B, L]."""
    unit = F.normalize(lines.float(), dim=-1)
    alike = (unit[:, :-1] * unit[:, 1:]).sum(-1)
    # Pairs of edges, to the left and to the right of tokens 1, 3, 5 and so on; the last may have a left one only.
    alike = F.pad(alike, (0, alike.shape[1] % 2), value=-torch.inf).unflatten(1, (-1, 2))
    best, side = alike.max(-1)
    strongest = best.argsort(dim=1, descending=True, stable=True)[:, :r]
    goes, to = 2 * strongest + 1, 2 * (strongest + side.gather(1, strongest))
    return numbered(each_its_own(lines).scatter(1, goes, to))


def largest(tokens: Tensor, assignment: Tensor, count: int) -> Tensor:
    """In each dimension the value of largest magnitude in each cluster: Tensor[B, L, C] to [B, count, C]."""
    index = assignment[..., None].expand_as(tokens)
    empty = tokens.new_zeros(tokens.shape[0], count, tokens.shape[2])
    high = empty.scatter_reduce(1, index, tokens, "amax", include_self=False)
    low = empty.scatter_reduce(1, index, tokens, "amin", include_self=False)
    return torch.where(high >= -low, high, low)


def shortened(image: Tensor, r: int, axis: int) -> tuple[Tensor, Tensor]:
    """A grid whose rows (axis 2) or columns (axis 1) lose r tokens: Tensor[B, H, W, C] to the smaller one, and to the
    cell of it that each token goes to, LongTensor[B, H · W]."""
    lines = image if axis == 2 else image.transpose(1, 2)
    place = match_beside(lines.flatten(0, 1), r)
    merged = largest(lines.flatten(0, 1), place, lines.shape[2] - r).unflatten(0, lines.shape[:2])
    place = place.unflatten(0, lines.shape[:2])
    other = torch.arange(lines.shape[1], device=image.device)[:, None]
    if axis == 2:
        return merged, (other * merged.shape[2] + place).flatten(1)
    return merged.transpose(1, 2), (place * lines.shape[1] + other).transpose(1, 2).flatten(1)


class CubistMerge(Peer):
    """location: after this layer. cells: (h, w), the grid that is left."""

    def __init__(self, found: FoundEncoder, location: int, cells: Sequence[int], restore_at: str = "decoder") -> None:
        super().__init__(found, restore_at)
        self.check_location(location)
        self.location, self.cells = location, two_cells(cells)

    def add_hooks(self) -> None:
        self.merge_before(self.location, self.merge)

    def merge(self, tokens: Tensor) -> Tensor:
        goal = tuple(map(min, self.cells, self.grid))
        if goal == self.grid:
            return tokens
        image, source = tokens.unflatten(1, self.grid), each_its_own(tokens)
        while image.shape[1:3] != goal:
            for axis in (2, 1):
                r = min(image.shape[axis] - goal[axis - 1], image.shape[axis] // 2)
                if r:
                    image, to = shortened(image, r, axis)
                    source = to.gather(1, source)
        self.unmerge = copy_back(source)
        return image.flatten(1, 2)


def apply(model: nn.Module, **settings: Any) -> Applied:
    """CubistMerge on a transformers model; settings as of `CubistMerge`."""
    return attach(model, CubistMerge, **settings)
