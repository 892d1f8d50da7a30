"""ForwardState: what one forward carries from hook to hook, and how N tokens become M and M become N again.

A sequence is front + patches + suffix: class, distillation, register and query tokens in front, detection tokens behind.
What stands in front may grow between layers, so patches are counted from the end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..clustering.smooth_unmerge import smoothing
from ..clusters import TokenClusters


def thread() -> int:
    """The running thread: one model may run in several at once, and each has a ForwardState of its own."""
    # The compiler cannot trace the question; compiled graphs keep a ForwardState of their own.
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


@dataclass(eq=False)
class Reduction:
    """One reduction: from a location on, the patches are M representatives.

    clusters: of the N patches, also where an earlier reduction had merged them: clusters nest.
    tokens, merged: the patches at the location before and after merging, Tensor[B, N, C] and [B, M, C].
    derived: what adapters made of the clusters, to be used by all layers of the reduction.
    """

    location: int
    grid: tuple[int, ...]
    clusters: TokenClusters
    tokens: Tensor
    merged: Tensor
    derived: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returns, made by the first layer that asks."""
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


@dataclass(eq=False)
class ForwardState:
    """One forward of one encoder.

    targets: M of each place, in order; None where the image has no more tokens than that.
    between: layers whose output the model itself reads on the grid before the next layer.
    wanted: the hidden states that somebody reads, by number; None: all.
    training: whether the encoder trains, and may move positions about.
    """

    grid: tuple[int, ...]
    num_tokens: int
    targets: list[int | None]
    suffix: int
    between: frozenset[int] = frozenset()
    wanted: frozenset[int] | None = None
    training: bool = False
    reductions: list[Reduction] = field(default_factory=list)
    states_unmerged: bool = False

    @property
    def reduction(self) -> Reduction | None:
        return self.reductions[-1] if self.reductions else None

    def split(self, hidden_states: Tensor, num_patches: int) -> tuple[Tensor, Tensor, Tensor]:
        """Front, patches and suffix of a sequence."""
        front = hidden_states.shape[1] - num_patches - self.suffix
        return (
            hidden_states[:, :front],
            hidden_states[:, front : front + num_patches],
            hidden_states[:, front + num_patches :],
        )

    def unmerge(self, hidden_states: Tensor, reduction: Reduction, restore: str | None) -> Tensor:
        """A sequence with all N patches from one with a reduction's M."""
        front, representatives, suffix = self.split(hidden_states, reduction.clusters.num_clusters)
        return torch.cat([front, reduction.unmerge(representatives, restore), suffix], 1)

    def merge(self, hidden_states: Tensor, reduction: Reduction) -> Tensor:
        """A sequence with a reduction's M patches from one with all N."""
        front, patches, suffix = self.split(hidden_states, self.num_tokens)
        return torch.cat([front, reduction.clusters.merge(patches), suffix], 1)
