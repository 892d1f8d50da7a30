"""The clock: at which denoising step of which picture a network is called, and which assignments it may therefore use.

Where a step is read from, the surest first: what the user said (`denoising`), the scheduler of the pipeline that makes
the call, the cache context of diffusers, where one is set. Where none of them knows, assignments are not used again,
and whether the first steps of a picture are over is told by the timesteps, which rise or fall in one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeGuard
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from ..config import AiluRusDiffusionConfig
from ..errors import AiluRusError
from ..per_thread import PerThread
from .cache_contexts import CacheContexts
from .calls import NetworkCall, calling_pipeline, guides_by_halves
from .frames import Assignments
from .kept_additions import KeptAdditions

log = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class Tick:
    """What the clock says of one call.

    Args:
        reduce: False in a step that runs on all tokens.
        share_cfg: whether the batch is two halves of the same latents.
        assignments: those that the call may use and adds to.
        additions: with `full_every`, what stacks added in the last full step; in a full step where to keep it, and None
            where nothing will be made of it.
        factor: what the keep ratio is multiplied by.
    """

    reduce: bool
    share_cfg: bool
    assignments: Assignments
    additions: KeptAdditions | None = None
    factor: float = 1.0


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
        additions: what stacks added, by the kind of call.
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
    additions: dict[CallKind, KeptAdditions] = field(default_factory=dict)
    counted: dict[tuple[CallPart, str | None], int] = field(default_factory=dict)

    def move_to(self, step: int) -> None:
        """Another step, or the same one."""
        if step != self.step:
            self.step = step
            self.calls.clear()
            self.counted.clear()

    def additions_of(self, part: CallPart, context: str | None, new: Callable[[], KeptAdditions]) -> KeptAdditions:
        """Those of the next call of a part, in a cache context. new: makes the first."""
        number = self.counted.get((part, context), 0)
        self.counted[part, context] = number + 1
        kept = self.additions.pop((part, context, number), None) or new()
        if self.schedule is None or self.step < len(self.schedule) - 1:
            # After the last step nothing comes, and their memory is not held.
            self.additions[part, context, number] = kept
        return kept

    def forget(self) -> None:
        """A forward broke off: what it has clustered and kept is not used again."""
        self.assignments, self.additions = {}, {}

    def note(self, part: CallPart, latents: Tensor) -> None:
        """A call of this step; two for one part that differ are of different pictures, such as tiles."""
        version = 0 if latents.is_inference() else latents._version
        before = self.calls.setdefault(part, (ref(latents), version))
        self.alone &= before[0]() is latents and before[1] == version


class Clock:
    """The clock of one network; each thread has its own generation."""

    def __init__(self, config: AiluRusDiffusionConfig, name: str) -> None:
        self.config, self.name = config, name
        self.contexts = CacheContexts()
        self._generations: PerThread[Generation] = PerThread()
        self._warned = False

    def tick(self, call: NetworkCall, by_halves: bool, frames: tuple[int, ...] | None) -> Tick:
        """Moves this thread's generation to the step of a call.

        Args:
            by_halves: whether pipelines guide this kind of network by batches of two halves.
            frames: the numbers of the frames of a video that the batch is.

        Raises AiluRusError where steps at the end shall run on all tokens, and how many there are is not known, and
        where every k-th shall, and which one it is is not known.
        """
        config = self.config
        if config.full_every == 1:
            return Tick(False, False, {})
        if torch.compiler.is_compiling():
            return self._tick_compiled()
        may_pair = config.share_cfg is None and by_halves and call.latents.shape[0] % 2 == 0
        if not config.counts_steps and not may_pair:
            return Tick(True, bool(config.share_cfg), {})
        pipeline = calling_pipeline()
        generation = self._generation(call, pipeline)
        part = tuple(call.latents.shape), frames
        share = bool(config.share_cfg)
        if may_pair and generation is not None and guides_by_halves(pipeline, call):
            share = self._are_halves(generation, part, call.latents)
        if not config.counts_steps:
            return Tick(True, share, {})
        if config.full_every is not None:
            return self._tick_full_steps(self._known(generation, part, call.latents), part, share)
        reduce, factor = self._reduces(generation), self._factor(generation)
        return Tick(reduce, share, self._assignments(generation, part, call.latents), factor=factor)

    def _tick_full_steps(self, generation: Generation, part: CallPart, share: bool) -> Tick:
        """With `full_every`: what earlier steps kept for this kind of call, and whether it builds on it."""
        config = self.config
        new = partial(KeptAdditions, config.full_every or 1, config.refresh_every, config.extrapolate)
        kept = generation.additions_of(part, self.contexts.current, new)
        reduce = kept.begin(generation.step, self._reduces(generation), self._factor(generation))
        used = reduce or self._is_built_on(generation)
        return Tick(reduce, share, kept.assignments, kept if used else None, kept.factor)

    def _tick_compiled(self) -> Tick:
        """What is said of a call that the compiler traces, for all that will run its graph."""
        config = self.config
        if config.unreduced_first_steps or config.unreduced_last_steps or config.full_every or config.step_factors:
            raise AiluRusError(
                "a compiled network does not count steps: leave none of them unreduced, and full_every and "
                "step_factors out"
            )
        return Tick(True, bool(config.share_cfg), {})

    @contextmanager
    def generation(self, scheduler: Scheduler | None) -> Iterator[None]:
        """All calls of this thread within are of one picture or batch."""
        before = self._generations.get()
        self._generations.set(Generation(scheduler=scheduler, given=True))
        try:
            yield
        finally:
            self._generations.pop()
            if before is not None:
                self._generations.set(before)

    def forget(self) -> None:
        """A forward broke off: what it has clustered is not used again."""
        generation = self._generations.get()
        if generation is not None:
            generation.forget()

    def _generation(self, call: NetworkCall, pipeline: object) -> Generation | None:
        """This thread's generation, moved to the step of this call, or a new one; None where nothing is known."""
        timestep, state = call.timestep, self._generations.get()
        if state is not None and state.given:
            self._move_given(state, timestep)
            return state
        step = _step_of_pipeline(pipeline, timestep, call.network)
        if step is not None:
            if state is None or state.schedule is not step.schedule or step.number < state.step:
                known = step.schedule is not None
                state = Generation(step.schedule, known=known, step=step.number, refreshed_at=step.number)
            state.move_to(step.number)
        elif self.config.unreduced_first_steps:
            state = _told_by_timesteps(state, _value_of(timestep))
        else:
            return None
        self._generations.set(state)
        return state

    def _move_given(self, state: Generation, timestep: Timestep) -> None:
        step = None if state.scheduler is None else _step_of(state.scheduler, timestep)
        if step is not None:
            state.schedule = step.schedule
            state.move_to(step.number)
            return
        value = _value_of(timestep)
        if state.timestep is not None and value != state.timestep:
            state.move_to(state.step + 1)
        state.timestep = value

    def _reduces(self, generation: Generation | None) -> bool:
        last = self.config.unreduced_last_steps
        step = 0 if generation is None else generation.step
        if last and step >= self._number_of_steps(generation, f"unreduced_last_steps={last}") - last:
            return False
        return step >= self.config.unreduced_first_steps

    def _is_built_on(self, generation: Generation) -> bool:
        """Whether a step that builds on it follows a full one."""
        config, following = self.config, generation.step + 1
        steps = None if generation.schedule is None else len(generation.schedule)
        if steps is not None and following >= steps - config.unreduced_last_steps:
            return False
        return following >= config.unreduced_first_steps

    def _factor(self, generation: Generation | None) -> float:
        """What the keep ratio of this step is multiplied by."""
        factors = self.config.step_factors
        if factors is None:
            return 1.0
        steps = self._number_of_steps(generation, f"step_factors={factors}")
        return factors[(0 if generation is None else generation.step) * len(factors) // steps]

    def _number_of_steps(self, generation: Generation | None, needed_for: str) -> int:
        """How many steps a generation has; AiluRusError where that is not known."""
        if generation is None or generation.schedule is None:
            raise AiluRusError(
                f"{needed_for} cannot be found: the timestep is none of those of the scheduler of a "
                "pipeline that makes this call. In a loop of your own: with denoising(network, scheduler)"
            )
        return len(generation.schedule)

    def _known(self, generation: Generation | None, part: CallPart, latents: Tensor) -> Generation:
        """The generation of a call with `full_every`; AiluRusError where its step or its picture cannot be told."""
        every = self.config.full_every
        if generation is None or not generation.known:
            raise AiluRusError(
                f"full_every={every} cannot tell which step this is: no pipeline of diffusers makes this call, or its "
                "scheduler has not this timestep. In a loop of your own: with denoising(network, scheduler)"
            )
        if not generation.given:
            generation.note(part, latents)
            if not generation.alone:
                raise AiluRusError(
                    f"full_every={every} cannot tell pictures apart: this pipeline calls {self.name} several times a "
                    "step, for tiles or pictures that differ. Leave it out"
                )
        return generation

    def _assignments(self, generation: Generation | None, part: CallPart, latents: Tensor) -> Assignments:
        """Those of earlier steps where they are of this picture for sure, else none."""
        if self.config.refresh_every == 1:
            return {}
        if generation is None or not generation.known:
            self._warn(
                "in a loop of your own, say where a picture begins and ends: with denoising(network, scheduler). No "
                "pipeline of diffusers makes this call, or its scheduler has not this timestep"
            )
            return {}
        if not generation.given:
            generation.note(part, latents)
            if not generation.alone:
                self._warn("this pipeline calls it several times a step, for tiles or pictures that differ")
                return {}
        if generation.step - generation.refreshed_at >= self.config.refresh_every or not generation.assignments:
            generation.assignments, generation.refreshed_at = {}, generation.step
        return generation.assignments

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "%s clusters in every call, and not in one of refresh_every=%d steps: %s",
                self.name,
                self.config.refresh_every,
                reason,
            )

    def _are_halves(self, generation: Generation, part: CallPart, latents: Tensor) -> bool:
        """Whether the two halves are the same latents. That waits for the device, so once a generation."""
        if part not in generation.halves:
            # Shapes alone have no values; diffusers' pipelines double the latents.
            generation.halves[part] = latents.is_meta or torch.equal(*latents.chunk(2))
        return generation.halves[part]


def _step_of_pipeline(pipeline: object, timestep: Timestep, network: nn.Module) -> Step | None:
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


def _step_of(scheduler: Scheduler, timestep: Timestep) -> Step | None:
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


def _told_by_timesteps(state: Generation | None, value: float) -> Generation:
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


def _value_of(timestep: Timestep) -> float:
    # Of timesteps for each token, those of a given first frame are 0 in every step.
    return float(timestep.max() if isinstance(timestep, Tensor) else timestep)


def index_among(timesteps: object, timestep: object) -> int | None:
    """Which of a scheduler's timesteps this is a view of, without asking the device for its value; None: of none."""
    if not isinstance(timesteps, Tensor) or not isinstance(timestep, Tensor) or timesteps.ndim != 1:
        return None
    if timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    return (timestep.storage_offset() - timesteps.storage_offset()) // timesteps.stride(0)
