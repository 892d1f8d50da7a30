"""AssignmentStore: which assignments a forward may use, and at which denoising step it stands.

A forward clusters at the first stack of a resolution and the later ones take that assignment (or each clusters, with
`cluster_per="stack"`); with `refresh_every` the next steps take it too. Each thread has its own run and its own generation. Under torch.compile each forward stands alone.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..clusters import TokenClusters
from ..config import AiluRusDiffusionConfig
from ..errors import AiluRusError
from .frames import JointClusters

# By grid, batch, which frames of a video those are, and the stack ("" where all of a resolution share).
Assignments = dict[tuple[tuple[int, ...], int, tuple[int, ...] | None, str], TokenClusters | JointClusters]


@dataclass
class Run:
    """One forward of a network.

    latent_side: rows or columns of the latents, whichever are more. reduce: False in steps that run on all tokens.
    share_cfg: whether the batch is two halves that share an assignment.
    current: what the stack that is running needs; it belongs to stacks.py.
    most_unreduced: tokens of the largest grid that ran unreduced for its size.
    """

    latent_side: int
    reduce: bool
    share_cfg: bool
    assignments: Assignments
    current: Any = None
    most_unreduced: int = 0


@dataclass
class Generation:
    """Where one thread stands in the denoising of one image. timesteps: those of the pipeline's scheduler, if it has them."""

    timesteps: Tensor | None = None
    timestep: float | None = None
    step: int = 0
    refreshed_at: int = 0
    assignments: Assignments = field(default_factory=dict)


class AssignmentStore:
    """The runs and generations of one network."""

    def __init__(self, config: AiluRusDiffusionConfig) -> None:
        self.config = config
        self._of_thread = threading.local()
        self._compiled: Run | None = None

    def __deepcopy__(self, memo: dict) -> AssignmentStore:
        return AssignmentStore(self.config)

    @property
    def run(self) -> Run | None:
        """The forward that this thread is in."""
        if torch.compiler.is_compiling():
            return self._compiled
        return getattr(self._of_thread, "run", None)

    def begin(self, latent_side: int, share_cfg: bool, timestep: Any, pipeline: Any) -> None:
        """A forward starts. timestep: a number or tensor; pipeline: whose scheduler has it, or None."""
        if torch.compiler.is_compiling():
            if self.config.unreduced_first_steps or self.config.unreduced_last_steps:
                raise AiluRusError("a compiled network does not count steps: leave none of them unreduced")
            self._compiled = Run(latent_side, True, share_cfg, {})
            return
        if not self.config.counts_steps:
            self._of_thread.run = Run(latent_side, True, share_cfg, {})
            return
        generation = self._generation(timestep, pipeline)
        reduce = self.config.unreduced_first_steps <= generation.step
        if self.config.unreduced_last_steps:
            if generation.timesteps is None:
                raise AiluRusError(
                    f"unreduced_last_steps={self.config.unreduced_last_steps} cannot be found: the timestep is none of "
                    "those of the scheduler of the pipeline that AiluRus was applied to"
                )
            reduce &= generation.step < len(generation.timesteps) - self.config.unreduced_last_steps
        if generation.step - generation.refreshed_at >= self.config.refresh_every or not generation.assignments:
            generation.assignments, generation.refreshed_at = {}, generation.step
        self._of_thread.run = Run(latent_side, reduce, share_cfg, generation.assignments)

    def end(self) -> None:
        """The forward is over; what it clustered stays with its generation."""
        if torch.compiler.is_compiling():
            self._compiled = None
        else:
            self._of_thread.run = None

    def _generation(self, timestep: Any, pipeline: Any) -> Generation:
        """This thread's generation, moved to the step of this forward, or a new one."""
        state: Generation | None = getattr(self._of_thread, "generation", None)
        timesteps = None if pipeline is None else pipeline.scheduler.timesteps
        step = place_among(timesteps, timestep)
        if step is not None:
            # Every generation makes timesteps of its own.
            if state is None or state.timesteps is not timesteps or step < state.step:
                state = Generation(timesteps, step=step)
            state.step = step
        else:
            # Without a schedule: within a generation timesteps fall.
            value = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
            if state is None or state.timestep is None or value > state.timestep:
                state = Generation(timestep=value)
            elif value < state.timestep:
                state.step, state.timestep = state.step + 1, value
        self._of_thread.generation = state
        return state


def place_among(timesteps: Any, timestep: Any) -> int | None:
    """Which of a scheduler's timesteps this is a view of, without asking the device for its value; None: of none."""
    if not isinstance(timesteps, Tensor) or not isinstance(timestep, Tensor) or timesteps.ndim != 1:
        return None
    if timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    return (timestep.storage_offset() - timesteps.storage_offset()) // timesteps.stride(0)
