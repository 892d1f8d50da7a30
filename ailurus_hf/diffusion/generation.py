"""Generations: the denoising of one picture or batch, where in it a call is, and what its steps hand on.

The step of a call is read from the schedulers of the pipeline that makes it, or from diffusers' cache context.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeGuard, TypeVar
from weakref import ReferenceType, ref

from torch import Tensor, nn

from .frames import Assignments

Kept = TypeVar("Kept")


class Scheduler(Protocol):
    """What the clock reads of diffusers' schedulers; those that count steps have `step_index`, too."""

    timesteps: Tensor


# As networks take it: a tensor on the schedulers' device, or a number.
Timestep = Tensor | float
# Which of several calls in one step: the shape of the latents, and which frames of a video they are.
CallPart = tuple[tuple[int, ...], tuple[int, ...] | None]
# The calls of one kind, one in each step: their part, their cache context, and which of the step's such calls they are:
# where guidance has no context of diffusers, it is the order of its calls that tells them apart.
CallKind = tuple[CallPart, str | None, int]


@dataclass(frozen=True, eq=False)
class Step:
    """A step of a schedule: its number, 0 the first, and the timesteps of the generation, None if unknown."""

    number: int
    schedule: Tensor | None = None


@dataclass(eq=False)
class Generation:
    """Where one thread stands in the denoising of one picture or batch.

    Args:
        schedule: the timesteps of the scheduler; every generation makes its own.
        scheduler: the one that the user gave.
        given: whether the user says where the generation begins and ends.
        known: whether the number of the step is known, or only told by whether timesteps rise or fall.
        step: the number of the step.
        refreshed_at: the step that the assignments are of.
        timestep: the last one, where no schedule has it. rises: whether they rise, as in an inversion.
        calls: the latents that each part was called with in this step.
        alone: whether each part was called with one tensor a step, and so for one picture.
        halves: whether a batch of so many is two halves of the same latents.
        kept: what one step keeps for others, by the kind of call.
        counted: how many calls there were of each part and cache context in this step.
    """

    schedule: Tensor | None = None
    scheduler: Scheduler | None = None
    given: bool = False
    known: bool = True
    step: int = 0
    refreshed_at: int = 0
    timestep: float | None = None
    rises: bool | None = None
    assignments: Assignments = field(default_factory=dict)
    calls: dict[CallPart, tuple[ReferenceType[Tensor], int]] = field(default_factory=dict)
    alone: bool = True
    halves: dict[CallPart, bool] = field(default_factory=dict)
    kept: dict[CallKind, Any] = field(default_factory=dict)
    counted: dict[tuple[CallPart, str | None], int] = field(default_factory=dict)

    def move_to(self, step: int) -> None:
        """Another step, or the same one."""
        if step != self.step:
            self.step = step
            self.calls.clear()
            self.counted.clear()

    def kept_of(self, part: CallPart, context: str | None, new: Callable[[], Kept]) -> Kept:
        """What is kept for the next call of a part, in a cache context. new: makes the first."""
        number = self.counted.get((part, context), 0)
        self.counted[part, context] = number + 1
        kept = self.kept.pop((part, context, number), None) or new()
        if self.schedule is None or self.step < len(self.schedule) - 1:
            # After the last step nothing comes, and their memory is not held.
            self.kept[part, context, number] = kept
        return kept

    def forget(self) -> None:
        """A forward broke off: what it has clustered and kept is not used again."""
        self.assignments, self.kept = {}, {}

    def note(self, part: CallPart, latents: Tensor) -> None:
        """A call of this step; two for one part that differ are of different pictures, such as tiles."""
        version = 0 if latents.is_inference() else latents._version
        before = self.calls.setdefault(part, (ref(latents), version))
        self.alone &= before[0]() is latents and before[1] == version


def step_of_pipeline(pipeline: object, timestep: Timestep, network: nn.Module) -> Step | None:
    """The step at which a pipeline makes a call, by its schedulers, or by the cache context that is set."""
    found = [] if pipeline is None else [part for part in vars(pipeline).values() if _is_scheduler(part)]
    for scheduler in found:
        number = index_among(scheduler.timesteps, timestep)
        if number is not None:
            return Step(number, scheduler.timesteps)
    # Some pipelines scale the timestep, so that it is no view of the schedule any more; their scheduler counts steps.
    step = _counted_step(found[0]) if len(found) == 1 else None
    if step is None and pipeline is not None:
        number = _number_in_cache_context(network)
        step = None if number is None else Step(number, found[0].timesteps if len(found) == 1 else None)
    return step


def _is_scheduler(part: object) -> TypeGuard[Scheduler]:
    return not isinstance(part, nn.Module) and hasattr(part, "timesteps") and hasattr(part, "step")


def step_of(scheduler: Scheduler, timestep: Timestep) -> Step | None:
    number = index_among(scheduler.timesteps, timestep)
    return _counted_step(scheduler) if number is None else Step(number, scheduler.timesteps)


def _counted_step(scheduler: Scheduler) -> Step | None:
    """The step that a scheduler has counted to, where it counts."""
    if not hasattr(scheduler, "step_index") or not isinstance(scheduler.timesteps, Tensor):
        return None
    number: int | None = scheduler.step_index
    if number is None:
        number = getattr(scheduler, "begin_index", None) or 0
    return Step(int(number), scheduler.timesteps) if number < len(scheduler.timesteps) else None


def _number_in_cache_context(network: nn.Module) -> int | None:
    """The step in the cache context that a pipeline calls in; there is one where a cache of diffusers is enabled."""
    for module in network.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for hook in getattr(registry, "hooks", {}).values():
            for manager in vars(hook).values():
                number = getattr(getattr(manager, "_context", None), "step_index", None)
                if number is not None:
                    return int(number)
    return None


def told_by_timesteps(state: Generation | None, value: float) -> Generation:
    """Without a schedule: within a generation timesteps only rise or only fall."""
    if state is None or state.timestep is None:
        return Generation(known=False, timestep=value)
    if value != state.timestep:
        rises = value > state.timestep
        if state.rises is not None and rises != state.rises:
            return Generation(known=False, timestep=value)
        state.rises, state.timestep = rises, value
        state.move_to(state.step + 1)
    return state


def value_of(timestep: Timestep) -> float:
    # Of timesteps for each token, those of a given first frame are 0 in every step.
    return float(timestep.max() if isinstance(timestep, Tensor) else timestep)


def index_among(timesteps: object, timestep: object) -> int | None:
    """Which of a scheduler's timesteps this is a view of, without asking the device for its value; None: of none."""
    if not isinstance(timesteps, Tensor) or not isinstance(timestep, Tensor) or timesteps.ndim != 1:
        return None
    if timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    return (timestep.storage_offset() - timesteps.storage_offset()) // timesteps.stride(0)
