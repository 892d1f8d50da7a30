"""ForwardState: what one forward carries from hook to hook, and how N tokens become M and M become N again.

A sequence is prefix + patches + suffix: class, distillation, register and query tokens before the patches, detection
tokens after them. Queries may join before the patches between layers, so patches are counted from the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..clustering.smooth_unmerge import smoothing
from ..clusters import TokenClusters


@dataclass(eq=False)
class Reduction:
    """From a location on, the patches are M representatives.

    clusters: of the N patches, also where an earlier reduction had merged them: clusters nest.
    tokens, merged: the patches at the location before and after merging, Tensor[B, N, C] and [B, M, C].
    derived: what adapters made of the clusters, for all layers up to the next location.
    """

    location: int
    grid: tuple[int, ...]
    clusters: TokenClusters
    tokens: Tensor
    merged: Tensor
    derived: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returns; the first call makes it."""
        if key not in self.derived:
            self.derived[key] = make()
        return self.derived[key]

    def centroids(self) -> Tensor:
        """The mean row and column of each cluster's patches, Tensor[B, M, 2] (fp32)."""
        return self.once("centroids", lambda: self.clusters.centroids(self.grid))

    def unmerge(self, representatives: Tensor, restore: str | None) -> Tensor:
        """All N patches from Tensor[B, M, C]."""
        if restore == "copy":
            return self.clusters.unmerge(representatives)
        if restore == "smooth":
            weights = self.once("smoothing", lambda: smoothing(self.clusters, self.tokens, self.grid))
            return weights.unmerge(representatives)
        return self.tokens + self.clusters.unmerge(representatives - self.merged)

    def detached(self) -> Reduction:
        """The same without its graph, and without what was derived."""
        return replace(self, tokens=self.tokens.detach(), merged=self.merged.detach(), derived={})


@dataclass(eq=False)
class ForwardState:
    """One forward of one encoder.

    targets: M of each location, in order; None where the image has no more tokens than that.
    between: layers whose output the model itself reads on the grid before the next layer.
    wanted: the hidden states that are read, by number; None: all.
    training: whether the encoder trains, and may move positions about.
    through_decoder: whether all tokens are back after the token decoder only.
    for_decoder: whether the encoder is done, and its decoder runs on representatives.
    """

    grid: tuple[int, ...]
    num_tokens: int
    targets: list[int | None]
    suffix: int
    between: frozenset[int] = frozenset()
    wanted: frozenset[int] | None = None
    training: bool = False
    through_decoder: bool = False
    reductions: list[Reduction] = field(default_factory=list)
    states_unmerged: bool = False
    for_decoder: bool = False
    _kept: ForwardState | None = None

    @property
    def reduction(self) -> Reduction | None:
        return self.reductions[-1] if self.reductions else None

    def split(self, hidden_states: Tensor, num_patches: int) -> tuple[Tensor, Tensor, Tensor]:
        """Prefix, patches and suffix of a sequence."""
        prefix = hidden_states.shape[1] - num_patches - self.suffix
        return (
            hidden_states[:, :prefix],
            hidden_states[:, prefix : prefix + num_patches],
            hidden_states[:, prefix + num_patches :],
        )

    def unmerge(self, hidden_states: Tensor, reduction: Reduction, restore: str | None) -> Tensor:
        """A sequence with all N patches from one with a reduction's M."""
        prefix, representatives, suffix = self.split(hidden_states, reduction.clusters.num_clusters)
        return torch.cat([prefix, reduction.unmerge(representatives, restore), suffix], 1)

    def merge(self, hidden_states: Tensor, reduction: Reduction) -> Tensor:
        """A sequence with a reduction's M patches from one with all N."""
        prefix, patches, suffix = self.split(hidden_states, self.num_tokens)
        return torch.cat([prefix, reduction.clusters.merge(patches), suffix], 1)

    def kept(self) -> ForwardState:
        """The same without its graph, for layers that run again when this forward is over."""
        if self._kept is None or len(self._kept.reductions) != len(self.reductions):
            self._kept = replace(self, reductions=[each.detached() for each in self.reductions], _kept=None)
        return self._kept

    def up_to(self, location: int) -> ForwardState:
        """The state in which the layer after a location ran."""
        reductions = [reduction for reduction in self.reductions if reduction.location <= location]
        return replace(self, reductions=reductions)
