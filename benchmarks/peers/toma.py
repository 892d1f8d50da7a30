"""ToMA (Lu et al. 2025, arXiv 2509.10918): tokens merged and unmerged by a matrix product around a network's modules.

In tiles of the grid, facility location picks the destinations: greedily the token that adds most to the sum of every
token's greatest cosine to a destination. A token's weights are the softmax of its cosines to the destinations of its
tile; merging takes each destination's weighted mean, unmerging each token's own mix of what comes back. Destinations
and weights are those of the first block of a part of the network (a down block, a transformer's list of blocks) and
serve its other blocks and the steps after.

By the paper and the authors' code (github.com/WenboLuu/ToMA, which has Flux alone): 4 x 4 tokens a tile, cosines times
1000. Which modules are merged around is a setting, as it is in tomesd, and so is for how many steps destinations and
weights serve: the code finds both anew wherever it merges. Text is never merged. Square grids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ailurus_hf.hooks import Hooks

from .steps import Steps, replace_forward, rows

SCALE = 1000.0


def facility_location(tokens: Tensor, count: int) -> Tensor:
    """Which of Tensor[B, N, C] are destinations, in the order in which they are found: LongTensor[B, count]."""
    unit = F.normalize(tokens.float(), dim=-1)
    alike = unit @ unit.transpose(1, 2)
    found = [alike.sum(2).argmax(1)]
    reached = alike[torch.arange(len(alike)), found[0]]
    for _ in range(count - 1):
        found.append((alike - reached[:, None]).clamp(min=0).sum(2).argmax(1))
        reached = torch.maximum(reached, alike[torch.arange(len(alike)), found[-1]])
    return torch.stack(found, 1)


def weights_to(tokens: Tensor, destinations: Tensor, scale: float = SCALE) -> Tensor:
    """How much each of Tensor[B, N, C] belongs to each destination, LongTensor[B, D]: Tensor[B, D, N], 1 a token."""
    unit = F.normalize(tokens.float(), dim=-1)
    return (scale * rows(unit, destinations) @ unit.transpose(1, 2)).softmax(1)


def tiled(tokens: Tensor, tile: int) -> Tensor:
    """Tokens of a square grid, Tensor[B, N, C], by square tiles of so many tokens a side: [B * tiles, tile², C]."""
    side = math.isqrt(tokens.shape[1])
    grid = tokens.unflatten(1, (side // tile, tile, side // tile, tile)).transpose(2, 3)
    return grid.reshape(-1, tile * tile, tokens.shape[2])


def untiled(tokens: Tensor, batch: int) -> Tensor:
    """The inverse of `tiled`."""
    tile, across = math.isqrt(tokens.shape[1]), math.isqrt(len(tokens) // batch)
    grid = tokens.reshape(batch, across, across, tile, tile, -1).transpose(2, 3)
    return grid.reshape(batch, -1, tokens.shape[2])


@dataclass
class Pattern:
    """What a part of the network merges by. weights: Tensor[B * tiles, D, tile²]. made: in which step, of each."""

    destinations: Tensor
    weights: Tensor
    destinations_made: int
    weights_made: int

    def merge(self, tokens: Tensor, tile: int) -> Tensor:
        means = self.weights / self.weights.sum(2, keepdim=True).clamp(min=1e-9)
        merged = means.to(tokens.dtype) @ tiled(tokens, tile)
        return merged.reshape(tokens.shape[0], -1, tokens.shape[2])

    def unmerge(self, merged: Tensor) -> Tensor:
        batch, channels = merged.shape[0], merged.shape[2]
        mixed = self.weights.to(merged.dtype).transpose(1, 2) @ merged.reshape(
            len(self.weights), self.weights.shape[1], channels
        )
        return untiled(mixed, batch)


class ToMA:
    """On one network, until `hooks.remove`.

    Args:
        keep: the share of tokens that are destinations.
        sizes: the numbers of image tokens that are merged; grids of others are left whole.
        modules: which of a block's modules: "attn1" or "attn", "attn2", "ff".
    """

    def __init__(
        self,
        network: nn.Module,
        keep: float,
        sizes: Sequence[int],
        *,
        modules: Sequence[str] = ("attn", "attn1"),
        tile: int = 4,
        destinations_every: int = 10,
        weights_every: int = 5,
    ) -> None:
        self.hooks, self.patterns = Hooks(), dict[Any, Pattern]()
        self.keep, self.sizes, self.tile = keep, tuple(sizes), tile
        self.destinations_every, self.weights_every = destinations_every, weights_every
        self.steps = Steps(network, self.hooks, self.patterns.clear)
        for name, block in network.named_modules():
            if name.rpartition(".")[0].endswith("transformer_blocks"):
                part = name.partition(".attentions")[0] if ".attentions" in name else name.rpartition(".")[0]
                for module in modules:
                    if getattr(block, module, None) is not None:
                        merging = partial(self._around, (part, module))
                        replace_forward(self.hooks, getattr(block, module), merging)

    def _around(
        self, place: tuple[str, str], original: Callable[..., Any], tokens: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if tokens.shape[1] not in self.sizes:
            return original(tokens, *args, **kwargs)
        pattern = self._pattern((*place, tokens.shape[1]), tokens)
        out = original(pattern.merge(tokens, self.tile), *args, **kwargs)
        if isinstance(out, tuple):
            return (pattern.unmerge(out[0]), *out[1:])
        return pattern.unmerge(out)

    def _pattern(self, place: Any, tokens: Tensor) -> Pattern:
        step, known = self.steps.number, self.patterns.get(place)
        tiles = tiled(tokens, self.tile)
        if known is None or step - known.destinations_made >= self.destinations_every:
            count = max(1, round(self.keep * self.tile**2))
            destinations = facility_location(tiles, count)
            known = Pattern(destinations, weights_to(tiles, destinations), step, step)
        elif step - known.weights_made >= self.weights_every:
            known.weights, known.weights_made = weights_to(tiles, known.destinations), step
        self.patterns[place] = known
        return known
