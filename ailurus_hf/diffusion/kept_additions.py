"""Clusters over steps: every k-th step runs on all tokens and keeps what each stack of blocks added to them.

In the steps between, stacks run on representatives, and a token adds what it added then, corrected by how much more or
less its representative adds now than it did then. What a representative added then is not the mean of its cluster, as
attention saw all tokens: so in a full step the stack runs on representatives, too (`replay.py`), and what sets a
token's addition apart from its representative's is kept. Clusters are made in full steps and serve until the next:
those of another step would set tokens apart in another way.

Where nothing runs between, a token adds what it added then, and no representatives are made.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .frames import Assignments, Clusters


@dataclass(frozen=True, eq=False)
class _Addition:
    """Of a full step, Tensor[B, N, C] each.

    Args:
        step: its number.
        apart: what its tokens added less what their representatives did; all that they added, where there were none.
        added: all that they added, where the next full step asks for it.
        growth: by how much what sets tokens apart grew a step since the full step before; None where that is unknown.
    """

    step: int
    apart: Tensor
    added: Tensor | None = None
    growth: Tensor | None = None


@dataclass(eq=False)
class KeptAdditions:
    """What the stacks of a network added in the last full step, for the calls of one kind, of one picture or batch.

    Args:
        every: steps from one that runs on all tokens to the next.
        refresh_every: steps that clusters serve at least; those after are up to the next full step.
        extrapolate: whether what is kept is drawn on in a straight line through the last two full steps, where these
            are `every` steps apart: after steps on all tokens at the beginning, a line would be drawn on far through
            two that are near.
        assignments: the clusters.
        factor: what the keep ratio is multiplied by until the next full step.
        step: the one that is running.
        full_step: the last one that ran on all tokens, None before the first.
        refreshed_at: the step that the clusters are from.
    """

    every: int
    refresh_every: int
    extrapolate: bool
    assignments: Assignments = field(default_factory=dict)
    factor: float = 1.0
    step: int = 0
    full_step: int | None = None
    refreshed_at: int = 0
    _of_stacks: dict[str, _Addition] = field(default_factory=dict)

    def begin(self, step: int, reduce: bool, factor: float) -> bool:
        """A step begins. Returns whether it runs on representatives.

        Args:
            step: its number.
            reduce: whether it may.
            factor: what the keep ratio is multiplied by, where it is a full one.
        """
        self.step = step
        if reduce and self.full_step is not None and 0 <= step - self.full_step < self.every:
            return True
        self.full_step, self.factor = step, factor
        if not self.assignments or not 0 <= step - self.refreshed_at < self.refresh_every:
            self.assignments, self.refreshed_at = {}, step
        return False

    def keep(self, stack: str, added: Tensor, clusters: Clusters | None = None, gained: Tensor | None = None) -> None:
        """In a full step of a stack, by name.

        Args:
            added: what its tokens added, Tensor[B, N, C].
            clusters: their clusters, None where nothing runs between. gained: what representatives added, [B, M, C].
        """
        before, growth, apart = self._of_stacks.get(stack), None, added
        if clusters is not None and gained is not None:
            apart = added - clusters.unmerge(gained)
        if before is not None and before.added is not None and self.step - before.step >= self.every:
            growth = (added - before.added) / (self.step - before.step)
            # What grew alike in a cluster, its representative shows; clusters of the step before were others.
            growth = growth if clusters is None else growth - clusters.unmerge(clusters.merge(growth))
        self._of_stacks[stack] = _Addition(self.step, apart, added if self.extrapolate else None, growth)

    def has(self, stack: str) -> bool:
        """Whether something is kept of a stack: a full step reached it."""
        return stack in self._of_stacks

    def apart(self, stack: str) -> Tensor | None:
        """What sets tokens apart by now, Tensor[B, N, C]; None where nothing is kept."""
        kept = self._of_stacks.get(stack)
        if kept is None or kept.growth is None:
            return None if kept is None else kept.apart
        return kept.apart + (self.step - kept.step) * kept.growth
