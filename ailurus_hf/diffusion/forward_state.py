"""What one forward of a network carries: its assignments, and the stack of blocks that is running.

Each thread has its own state. It is made when the network is entered and gone when the network is left, also by an
exception.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from ..per_thread import PerThread
from .calls import NetworkCall
from .frames import Assignments, Clusters
from .kept_additions import KeptAdditions
from .kept_layers import KeptLayers
from .replay import BlockCall
from .rotary import Rotary
from .stacks import Stack
from .token_order import TokenOrder


def key_bias(clusters: Clusters | None, tokens: Tensor) -> Tensor:
    """Log counts as blocks take a bias on self-attention: Tensor[B, 1, M]."""
    assert clusters is not None
    return clusters.log_counts()[:, None, :].to(tokens.dtype)


@dataclass(eq=False)
class StackState:
    """What a stack carries from its first hook to its last.

    Args:
        stack: the blocks.
        grid: of its tokens.
        scope: "blocks" or "attention".
        number: in the order in which they run, of the stack or, in transformers on patches, of the reduced block.
        reached: whether the first block to be reduced was reached.
        whole: whether it runs on all tokens, and what it adds is kept.
        skipped: whether its blocks do not run, and its tokens add what was kept.
        calls: its blocks' calls then.
        call: of the network, where a rotary embedding depends on its arguments.
        clusters: of the tokens, once they are merged; with scope="attention" None, as each layer asks for them.
        kept: what all N tokens keep, Tensor[B, N, C] or [B, C, H, W].
        start: the representatives that the gain is counted from, in the form that the blocks get them in.
        key_bias: log counts, Tensor[B, 1, M], for blocks that take an attention mask.
        rotary: the rotary embedding of text and representatives.
        order: where image and text tokens stand in attention, in transformers.
        modulation: what blocks get for each token, and for each representative in its place.
        others: the tokens beside the image's in the sequence that the first block gets, None where it has none.
    """

    stack: Stack
    grid: tuple[int, ...]
    scope: str
    number: int = 0
    reached: bool = False
    whole: bool = False
    skipped: bool = False
    calls: list[BlockCall] = dataclasses.field(default_factory=list)
    call: NetworkCall | None = None
    clusters: Clusters | None = None
    kept: Tensor | None = None
    start: Tensor | None = None
    key_bias: Tensor | None = None
    rotary: Rotary | None = None
    order: TokenOrder | None = None
    others: Tensor | None = None
    modulation: tuple[Tensor, Tensor] | None = None

    @property
    def token_order(self) -> TokenOrder:
        """The order in a transformer."""
        assert self.order is not None
        return self.order


@dataclass(eq=False)
class ForwardState:
    """One forward of a network.

    Args:
        latent_side: rows or columns of the latents, whichever are more.
        reduce: False in a step that runs on all tokens.
        share_cfg: whether the batch is two halves that share an assignment.
        assignments: what this forward may use and adds to.
        stack: the stack that is running reduced, None elsewhere.
        most_unreduced: tokens of the largest grid that ran unreduced for its size.
        recomputing: whether a gradient checkpoint runs a part of the forward again.
        traced: whether the compiler traces the whole forward.
        additions: with `full_every`, what stacks added in the last full step; in a full step where to keep it.
        layers: with `inner_every`, what inner layers gave, or where to keep it.
        factor: what the keep ratio is multiplied by in this step.
        skips: whether a stack was skipped in it, or inner layers.
        arrived: the names of the stacks between convolutions that ran.
    """

    latent_side: int
    reduce: bool
    share_cfg: bool
    assignments: Assignments
    stack: StackState | None = None
    most_unreduced: int = 0
    recomputing: bool = False
    traced: bool = False
    additions: KeptAdditions | None = None
    layers: KeptLayers | None = None
    factor: float = 1.0
    skips: bool = False
    arrived: set[str] = dataclasses.field(default_factory=set)

    def level_of(self, grid: tuple[int, ...]) -> int:
        """How many times smaller a grid's sides are than the latents'."""
        # Sides are halved and rounded up, so a level is known by its nearest power of two.
        return int(2 ** round(math.log2(self.latent_side / max(grid))))

    def arrive_at(self, stack: Stack) -> bool:
        """A stack begins; whether it is the first time in this forward, or a checkpoint runs it again."""
        first = self.recomputing or stack.name not in self.arrived
        self.arrived.add(stack.name)
        return first

    def at_this_point(self) -> ForwardState:
        """A copy to run the next block again from, as often as need be."""
        stack = None if self.stack is None else dataclasses.replace(self.stack)
        return dataclasses.replace(self, stack=stack, recomputing=True)


class Forwards:
    """The forwards that a network is in, one a thread."""

    def __init__(self) -> None:
        self._states: PerThread[ForwardState] = PerThread()

    @property
    def current(self) -> ForwardState | None:
        """The forward that this thread is in."""
        return self._states.get()

    @property
    def running_elsewhere(self) -> bool:
        """Whether another thread is in a forward."""
        return self._states.is_busy_elsewhere()

    def begin(self, state: ForwardState) -> None:
        """This thread enters the network."""
        self._states.set(state)

    def end(self) -> ForwardState | None:
        """This thread leaves the network, with the state that it had."""
        return self._states.pop()

    @contextmanager
    def resumed(self, state: ForwardState) -> Iterator[None]:
        """Runs a part of an earlier forward again."""
        before = self._states.get()
        self._states.set(state)
        try:
            yield
        finally:
            self._states.pop()
            if before is not None:
                self._states.set(before)
