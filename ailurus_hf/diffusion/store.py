"""AssignmentStore: which assignments a forward may use, and at which denoising step it stands.

A forward clusters at the first stack of a resolution and the later ones take that assignment; with `refresh_every` so do
the next steps. Each thread has its own run and its own generation. Under torch.compile each forward stands alone.
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

# Grid and batch.
Assignments = dict[tuple[tuple[int, ...], int], TokenClusters]


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
    """Where one thread stands in the denoising of one image. schedule: the timesteps, where a pipeline told them."""

    timesteps: Tensor | None = None
    schedule: list[float] | None = None
    step: int = 0
    timestep: float | None = None
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
        """A forward starts. timestep: a number or tensor; pipeline: whose scheduler has the timesteps, or None."""
        if torch.compiler.is_compiling():
            if self.config.unreduced_first_steps or self.config.unreduced_last_steps:
                raise AiluRusError("a compiled network does not count steps: leave none of them unreduced")
            self._compiled = Run(latent_side, True, share_cfg, {})
            return
        if not self.config.counts_steps:
            self._of_thread.run = Run(latent_side, True, share_cfg, {})
            return
        generation = self._generation(timestep, pipeline)
        first, last = self.config.unreduced_first_steps, self.config.unreduced_last_steps
        total = None if generation.schedule is None else len(generation.schedule)
        reduce = first <= generation.step and (total is None or generation.step < total - last)
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
        timesteps = None if pipeline is None else getattr(pipeline.scheduler, "timesteps", None)
        # A device's number costs waiting for it, so in a pipeline it is read once a generation, and steps are counted.
        known = not isinstance(timestep, Tensor) or timestep.device.type == "cpu"
        if isinstance(timesteps, Tensor):
            if state is None or state.timesteps is not timesteps:
                schedule = [float(t) for t in timesteps.tolist()]
                state = Generation(timesteps, schedule, timestep=_number(timestep))
                # Image-to-image starts in the middle.
                state.step = schedule.index(state.timestep) if state.timestep in schedule else 0
            else:
                state = _next_scheduled(state, _number(timestep) if known else None)
        else:
            value = _number(timestep)
            if state is None or state.timestep is None or state.schedule is not None or value > state.timestep:
                state = Generation(timestep=value)
            elif value < state.timestep:
                state.step, state.timestep = state.step + 1, value
        self._of_thread.generation = state
        return state


def _next_scheduled(state: Generation, value: float | None) -> Generation:
    """The step after the last one; where the timestep is known, the step it stands at."""
    assert state.schedule is not None
    schedule, following = state.schedule, state.step + 1
    restart = Generation(state.timesteps, schedule, timestep=value)
    if value is None or value not in schedule:
        state.step = following
        return state if following < len(schedule) else restart
    if following < len(schedule) and schedule[following] == value:
        state.step = following
    elif schedule[state.step] != value:
        later = [step for step in range(following, len(schedule)) if schedule[step] == value]
        if not later:
            # Denoising goes on from an earlier step: another image.
            restart.step = schedule.index(value)
            return restart
        state.step = later[0]
    return state


def _number(timestep: Any) -> float:
    return float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
