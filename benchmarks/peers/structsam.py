"""StructSAM (Nguyen et al. 2026, arXiv:2603.07307): flat parts of the grid are merged for attention, edges are not.

From the paper's abstract (energy of tokens from first-order gradients of features, a screen of grid cells by flatness,
merging in flat areas toward tokens of low energy, recovery of all tokens) and, for the steps, from public code that
names itself after it (`grad_cell_pitome_soft_matching`; read and not copied, and not shown to be the authors'): energy
is the Sobel gradient's magnitude, over channels; cells are 2 x 2 and as flat as their token of most energy; r tokens
less take the ceil(r / 3) flattest cells, in each of which the token of least energy stays and the other three may go,
each to the most alike (cosine) that stays in any of them; the r strongest edges are merged into plain means. Tokens are
merged before attention and copied back behind it, in every layer, so that the MLP runs on all.

Decided here: at the image's border gradients repeat the border, so that it is no edge; rows and columns that fill no
cell are protected; cells are of the least side that can lose r; nothing is known of prompts. A ViT has no need of the
whole grid between layers: with `location` tokens are merged once, after that layer, attention is proportional to counts
as in ToMe, and the grid is recovered at the end. That form is not the paper's.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ailurus_hf import AiluRusConfig, TokenClusters
from ailurus_hf.clustering.rows import image_rows
from ailurus_hf.errors import AiluRusError
from ailurus_hf.vision.discovery import FoundEncoder

from .hooks import Applied, Peer, attach
from .leaders import each_its_own, numbered


def gradients(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Root mean square over channels of the Sobel gradient: Tensor[B, N, C] on a grid to [B, N]."""
    image = F.pad(tokens.float().transpose(1, 2).unflatten(2, grid), (1, 1, 1, 1), mode="replicate")
    down = image[..., :-2, :] + 2 * image[..., 1:-1, :] + image[..., 2:, :]
    across = image[..., :-2] + 2 * image[..., 1:-1] + image[..., 2:]
    horizontal, vertical = down[..., 2:] - down[..., :-2], across[..., 2:, :] - across[..., :-2, :]
    return (horizontal.square() + vertical.square()).mean(1).sqrt().flatten(1)


def whole_cells(grid: tuple[int, int], r: int) -> Tensor:
    """The tokens of each whole square cell, of the least side (from 2 on) at which all cells can lose r tokens."""
    for side in itertools.count(2):
        rows, columns = (length // side for length in grid)
        if not rows * columns:
            raise AiluRusError(f"no cells of a {grid[0]} x {grid[1]} grid can lose {r} tokens")
        if rows * columns * (side**2 - 1) >= r:
            break
    index = torch.arange(math.prod(grid)).view(grid)[: rows * side, : columns * side]
    return index.unflatten(1, (-1, side)).unflatten(0, (-1, side)).transpose(1, 2).reshape(-1, side**2)


def match_flat(tokens: Tensor, grid: tuple[int, int], r: int) -> Tensor:
    """The leader of each token, r of which go to another: Tensor[B, N, C] to LongTensor[B, N]."""
    energy, cells = gradients(tokens, grid), whole_cells(grid, r).to(tokens.device)
    flattest = energy[:, cells].amax(-1).argsort(dim=1, stable=True)[:, : math.ceil(r / (cells.shape[1] - 1))]
    chosen = cells[flattest]
    within = energy.gather(1, chosen.flatten(1)).view_as(chosen).argsort(dim=2, stable=True)
    chosen = chosen.gather(2, within)
    stay, may_go = chosen[..., 0], chosen[..., 1:].flatten(1)
    unit = F.normalize(tokens.float(), dim=-1)
    best, target = (image_rows(unit, may_go) @ image_rows(unit, stay).transpose(1, 2)).max(-1)
    strongest = best.argsort(dim=1, descending=True, stable=True)[:, :r]
    return each_its_own(tokens).scatter(1, may_go.gather(1, strongest), stay.gather(1, target.gather(1, strongest)))


class StructSAM(Peer):
    """keep: share of the tokens that is left, in every layer's attention, or after layer `location` for good."""

    def __init__(
        self, found: FoundEncoder, keep: float = 0.5, location: int | None = None, restore_at: str = "backbone"
    ) -> None:
        super().__init__(found, restore_at)
        if location is not None:
            self.check_location(location)
        self.location, self.budget = location, AiluRusConfig(keep_ratio=keep)

    def add_hooks(self) -> None:
        if self.location is not None:
            self.merge_before(self.location, self.merge_for_good)
            return
        for layer in self.layers:
            for module in layer.modules():
                if {"q_proj", "k_proj"} <= dict(module.named_children()).keys():
                    self._merge_around(module)

    def clusters(self, tokens: Tensor) -> TokenClusters | None:
        count = self.budget.clusters_for(self.num_tokens)
        if count == self.num_tokens:
            return None
        leader = match_flat(tokens, self.grid, self.num_tokens - count)
        return TokenClusters.from_assignment(numbered(leader), count)

    def merge_for_good(self, tokens: Tensor) -> Tensor:
        clusters = self.clusters(tokens)
        if clusters is None:
            return tokens
        self.bias, self.unmerge = clusters.counts.log(), clusters.unmerge
        return clusters.merge(tokens)

    def _merge_around(self, attention: nn.Module) -> None:
        held: dict[str, TokenClusters | None] = {}

        def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            prefix, tokens = self.split(args[0] if args else kwargs["hidden_states"])
            clusters = held["clusters"] = self.clusters(tokens)
            if clusters is None:
                return None
            sequence = torch.cat([prefix, clusters.merge(tokens)], 1)
            return ((sequence, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": sequence})

        def behind(module: nn.Module, args: tuple, output: tuple) -> tuple | None:
            clusters = held.pop("clusters")
            return None if clusters is None else (self._unmerged(output[0], clusters.unmerge), *output[1:])

        self.hooks.pre_forward(attention, before)
        self.hooks.post_forward(attention, behind)


def apply(model: nn.Module, **settings: Any) -> Applied:
    """StructSAM on a transformers model; settings as of `StructSAM`."""
    return attach(model, StructSAM, **settings)
