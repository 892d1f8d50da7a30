"""The clock: at which denoising step of which picture a network is called, and which assignments it may therefore use.

Where a step is read from, the surest first: what the user said (`denoising`), the scheduler of the pipeline that makes
the call, the cache context of diffusers, where one is set. Where none of them knows, assignments are not used again,
and whether the first steps of a picture are over is told by the timesteps, which rise or fall in one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..config import AiluRusDiffusionConfig
from ..errors import AiluRusError
from ..per_thread import PerThread
from .cache_contexts import CacheContexts
from .calls import NetworkCall, calling_pipeline, guides_by_halves
from .frames import Assignments
from .generation import (
    CallPart,
    Generation,
    Scheduler,
    Timestep,
    step_of,
    step_of_pipeline,
    told_by_timesteps,
    value_of,
)
from .kept_additions import KeptAdditions
from .kept_layers import KeptLayers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tick:
    """What the clock says of one call.

    Args:
        reduce: False in a step that runs on all tokens.
        share_cfg: whether the batch is two halves of the same latents.
        assignments: those that the call may use and adds to.
        additions: with `full_every`, what stacks added in the last full step; in a full step where to keep it, and None
            where nothing will be made of it.
        layers: with `inner_every`, what inner layers gave; None where nothing is or will be made of it.
        factor: what the keep ratio is multiplied by.
    """

    reduce: bool
    share_cfg: bool
    assignments: Assignments
    additions: KeptAdditions | None = None
    layers: KeptLayers | None = None
    factor: float = 1.0


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
        layers = None
        if (config.inner_every or 1) > 1:
            layers = self._layers(self._known(generation, part, call.latents), part)
        reduce, factor = self._reduces(generation), self._factor(generation)
        return Tick(reduce, share, self._assignments(generation, part, call.latents), layers=layers, factor=factor)

    def _tick_full_steps(self, generation: Generation, part: CallPart, share: bool) -> Tick:
        """With `full_every`: what earlier steps kept for this kind of call, and whether it builds on it."""
        config = self.config
        new = partial(KeptAdditions, config.full_every or 1, config.refresh_every, config.extrapolate)
        kept: KeptAdditions = generation.kept_of(part, self.contexts.current, new)
        reduce = kept.begin(generation.step, self._reduces(generation), self._factor(generation))
        used = reduce or self._is_built_on(generation)
        return Tick(reduce, share, kept.assignments, kept if used else None, factor=kept.factor)

    def _layers(self, generation: Generation, part: CallPart) -> KeptLayers | None:
        """With `inner_every`: what inner layers gave for this kind of call, where it is or will be used."""
        new = partial(KeptLayers, self.config.inner_every or 1, self.config.extrapolate)
        kept: KeptLayers = generation.kept_of(part, self.contexts.current, new)
        kept.begin(generation.step, whole=not self._reduces(generation))
        return kept if kept.skips or self._is_built_on(generation) else None

    def _tick_compiled(self) -> Tick:
        """What is said of a call that the compiler traces, for all that will run its graph."""
        config = self.config
        unreduced = config.unreduced_first_steps or config.unreduced_last_steps
        if unreduced or config.builds_on_steps or config.step_factors:
            raise AiluRusError(
                "a compiled network does not count steps: leave none of them unreduced, and full_every, inner_every "
                "and step_factors out"
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
        step = step_of_pipeline(pipeline, timestep, call.network)
        if step is not None:
            if state is None or state.schedule is not step.schedule or step.number < state.step:
                known = step.schedule is not None
                state = Generation(step.schedule, known=known, step=step.number, refreshed_at=step.number)
            state.move_to(step.number)
        elif self.config.unreduced_first_steps:
            state = told_by_timesteps(state, value_of(timestep))
        else:
            return None
        self._generations.set(state)
        return state

    def _move_given(self, state: Generation, timestep: Timestep) -> None:
        step = None if state.scheduler is None else step_of(state.scheduler, timestep)
        if step is not None:
            state.schedule = step.schedule
            state.move_to(step.number)
            return
        value = value_of(timestep)
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
        """The generation of a call that builds on steps; AiluRusError where its step or picture cannot be told."""
        name = "inner_every" if self.config.full_every is None else "full_every"
        every = f"{name}={getattr(self.config, name)}"
        if generation is None or not generation.known:
            raise AiluRusError(
                f"{every} cannot tell which step this is: no pipeline of diffusers makes this call, or its "
                "scheduler has not this timestep. In a loop of your own: with denoising(network, scheduler)"
            )
        if not generation.given:
            generation.note(part, latents)
            if not generation.alone:
                raise AiluRusError(
                    f"{every} cannot tell pictures apart: this pipeline calls {self.name} several times a "
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
