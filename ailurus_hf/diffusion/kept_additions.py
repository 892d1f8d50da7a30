"""Clusters over steps: every k-th step runs on all tokens and keeps what each stack of blocks added to them.

In the steps between, stacks run on representatives, and a token adds what it added then, corrected by how much more or
less its representative adds now than it did then. What a representative added then is not the mean of its cluster, as
attention saw all tokens: so in a full step the stack runs on representatives, too (`replay.py`), and what sets a
token's addition apart from its representative's is kept. Clusters are made in full steps and serve until the next:
those of another step would set tokens apart in another way.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .frames import Assignments


@dataclass(frozen=True, eq=False)
class _Addition:
    """What set the tokens apart in a full step, and by how much that grew a step since the full one before."""

    step: int
    apart: Tensor
    growth: Tensor | None = None


@dataclass(eq=False)
class KeptAdditions:
    """What the stacks of a network added in the last full step, for the calls of one kind, of one picture or batch.

    Args:
        every: steps from one that runs on all tokens to the next.
        refresh_every: steps that clusters serve at least; those after are up to the next full step.
        extrapolate: whether what is kept is drawn on in a straight line through the last two full steps.
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

    def keep(self, stack: str, apart: Tensor) -> None:
        """In a full step of a stack, by name: what tokens added less what their representatives add, [B, N, C]."""
        before = self._of_stacks.get(stack)
        growth = None
        if self.extrapolate and before is not None and before.step < self.step:
            growth = (apart - before.apart) / (self.step - before.step)
        self._of_stacks[stack] = _Addition(self.step, apart, growth)

    def apart(self, stack: str) -> Tensor | None:
        """What sets tokens apart by now, Tensor[B, N, C]; None where nothing is kept, as the stack was skipped then."""
        kept = self._of_stacks.get(stack)
        if kept is None or kept.growth is None:
            return None if kept is None else kept.apart
        return kept.apart + (self.step - kept.step) * kept.growth
