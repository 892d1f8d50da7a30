"""What the inner layers of a UNet gave in the last step in which they ran (`inner_layers.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(eq=False)
class KeptLayers:
    """For the calls of one kind, of one picture or batch.

    Args:
        every: steps from one in which they run to the next.
        extrapolate: whether what comes from below is drawn on in a straight line through the last two such steps, where
            these are `every` steps apart, as in `KeptAdditions`.
        step: the one that is running, and `ran_at` the last one in which they ran.
        outputs: what they gave then, by their paths.
        from_below: what came to the last layer from below, Tensor[B, C, H, W].
        growth: of that, in a step; None where it is unknown.
    """

    every: int
    extrapolate: bool
    step: int = 0
    ran_at: int | None = None
    outputs: dict[str, Any] = field(default_factory=dict)
    from_below: Tensor | None = None
    growth: Tensor | None = None
    _kept_at: int = 0

    @property
    def skips(self) -> bool:
        """Whether the inner layers do not run in this step."""
        return self.step != self.ran_at

    def begin(self, step: int, whole: bool) -> None:
        """A step begins. whole: all layers run in it, whenever they did before."""
        self.step = step
        if whole or self.ran_at is None or not 0 <= step - self.ran_at < self.every:
            self.ran_at = step
            self.outputs.clear()

    def keep(self, from_below: Tensor) -> None:
        """In a step in which all layers run."""
        if self.extrapolate:
            apart = self.step - self._kept_at
            before = self.from_below if apart >= self.every else None
            self.growth = None if before is None else (from_below - before) / apart
        self.from_below, self._kept_at = from_below, self.step

    def now(self) -> Tensor:
        """What comes from below, by what was kept."""
        assert self.from_below is not None
        if self.growth is None:
            return self.from_below
        return self.from_below + (self.step - self._kept_at) * self.growth
