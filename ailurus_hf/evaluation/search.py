"""The search behind `autotune`: what is measured of a candidate, which ones go on, and which one is chosen.

Every input goes through the plain model and through all candidates in turn, so that what else the machine does meets
all of them; a speed-up is a ratio of two times of the same turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch

from ..apply import ailurus_enabled
from ..config import AiluRusConfig, AiluRusDiffusionConfig
from ..errors import AiluRusError
from .timing import wait_for

AnyConfig = AiluRusConfig | AiluRusDiffusionConfig
Goal = tuple[Literal["speedup", "max_loss", "pareto"], float]
# Settings whose speed differs by less are the same to a user.
TIE = 0.01
RESAMPLES = 500
# Losses below are as good as none.
NO_LOSS = 1e-4


@dataclass(eq=False)
class Candidate:
    """A setting, and what was seen of it.

    Args:
        config, label: the setting, and the same in words.
        ideal: speed-up by FLOPs alone; None where it is not known.
        ratios: plain over reduced time, one a turn. seconds: reduced time.
        losses: by the number of the input.
        way: of a variant, what makes it another than the setting that it is a variant of, in words.
    """

    config: AnyConfig
    label: str
    ideal: float | None = None
    ratios: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: dict[int, float] = field(default_factory=dict)
    way: str = ""

    @property
    def loss(self) -> float:
        return statistics.fmean(self.losses.values())

    @property
    def speed_up(self) -> float:
        """Measured; until then by the one turn that was seen and by FLOPs, which a single time may not outdo."""
        measured = statistics.median(self.ratios)
        return measured if self.ideal is None or len(self.ratios) > 1 else min(measured, self.ideal)


class Subject(Protocol):
    """What is tuned: a model or a pipeline with its inputs."""

    target: Any
    device: torch.device
    num_inputs: int

    def run(self, index: int) -> Any:
        """The output for one input."""

    def loss(self, plain: Any, reduced: Any, index: int) -> float:
        """How much worse a reduced output is than the plain one."""

    def first(self) -> list[Candidate]:
        """Candidates that differ in what decides most."""

    def variants(self, candidate: Candidate) -> list[Candidate]:
        """The same in other ways, of about the same speed."""

    def ideal(self) -> float | None:
        """Speed-up by FLOPs alone, of the last reduced run."""


class Measuring:
    """Runs candidates and the plain model in turn.

    Args:
        subject: what is tuned.
        timer: a clock in seconds.
        advance: called after each run.
    """

    def __init__(
        self,
        subject: Subject,
        timer: Callable[[], float] = time.perf_counter,
        advance: Callable[[], Any] = lambda: None,
    ) -> None:
        self.subject, self.timer, self.advance = subject, timer, advance

    def turn(self, candidates: Sequence[Candidate], index: int, backwards: bool = False) -> None:
        """One input through all; every other turn goes backwards through the candidates."""
        plain, taken = self._run(None, index)
        for candidate in reversed(candidates) if backwards else candidates:
            output, seconds = self._run(candidate, index)
            candidate.seconds.append(seconds)
            candidate.ratios.append(taken / seconds)
            candidate.losses[index] = self.subject.loss(plain, output, index)

    def _run(self, candidate: Candidate | None, index: int) -> tuple[Any, float]:
        subject = self.subject
        with ailurus_enabled(subject.target, None if candidate is None else candidate.config):
            wait_for(subject.device)
            start = self.timer()
            output = subject.run(index)
            wait_for(subject.device)
            seconds = self.timer() - start
            if candidate is not None and candidate.ideal is None:
                candidate.ideal = subject.ideal()
        self.advance()
        return output, seconds


def usable(target: Any, candidates: Iterable[Candidate]) -> list[Candidate]:
    """Those that the target can be reduced with.

    Raises:
        AiluRusError: as the first candidate did, where there is none.
    """
    found, refused = [], None
    for candidate in candidates:
        try:
            with ailurus_enabled(target, candidate.config):
                found.append(candidate)
        except AiluRusError as error:
            refused = refused or error
    if not found:
        raise refused or AiluRusError("there is no candidate: give some")
    return found


def survivors(candidates: Sequence[Candidate], goal: Goal, count: int, slack: float) -> list[Candidate]:
    """The `count` candidates that are nearest to the goal; slack: by how much of it a number may be wrong yet.

    Half of the places are for those that reach the goal by the numbers there are: what just misses it is better in all
    else, and would leave none of them.
    """
    kind, wanted = goal
    if kind == "speedup":
        return _nearest(candidates, count, lambda c: wanted / c.speed_up, 1 / (1 - slack), lambda c: c.loss)
    if kind == "max_loss":
        return _nearest(
            candidates, count, lambda c: c.loss / max(wanted, NO_LOSS), 1 + 4 * slack, lambda c: -c.speed_up
        )
    found: list[Candidate] = []
    left = list(candidates)
    while left and len(found) < count:
        front = [c for c in left if not any(_beats(other, c) for other in left)]
        found += sorted(front, key=lambda c: c.loss)
        left = [c for c in left if c not in front]
    return found[:count]


def _nearest(
    candidates: Sequence[Candidate],
    count: int,
    share: Callable[[Candidate], float],
    most: float,
    cost: Callable[[Candidate], float],
) -> list[Candidate]:
    """share: of what the goal allows, which may be up to `most` yet. cost: what is least in the best of those."""
    ordered = sorted(candidates, key=lambda c: (cost(c), share(c)))
    near = [c for c in ordered if share(c) <= most]
    reach = [c for c in near if share(c) <= 1][: (count + 1) // 2]
    others = [c for c in near if c not in reach]
    rest = sorted((c for c in ordered if share(c) > most), key=share)
    return [*reach, *others, *rest][:count]


def _beats(one: Candidate, other: Candidate) -> bool:
    better = one.speed_up > other.speed_up or one.loss < other.loss
    return better and one.speed_up >= other.speed_up and one.loss <= other.loss


def foresee(variants: Sequence[Candidate], base: Candidate, probed: Mapping[Candidate, Sequence[Candidate]]) -> None:
    """Gives variants of a setting the speed and the loss that their ways had, beside its own, in a setting of about its
    loss that was measured in every way.

    Args:
        variants: not measured yet; of ways that some setting was measured in.
        base: what they are variants of, measured.
        probed: measured settings and their measured variants.
    """
    for each in variants:
        same = [(other, one) for one, others in probed.items() for other in others if other.way == each.way]
        other, one = min(same, key=lambda pair: abs(np.log(_cost(pair[1]) / _cost(base))))
        each.ratios = [base.speed_up * other.speed_up / one.speed_up]
        each.losses = {0: base.loss * _cost(other) / _cost(one)}


def _cost(candidate: Candidate) -> float:
    """The loss as something to divide by: with labels a setting may gain."""
    return max(candidate.loss, 0.0) + NO_LOSS


@dataclass(frozen=True)
class Choice:
    """The chosen candidate; whether it reaches the goal; what speaks against it, in words.

    more_turns_help: whether what speaks against it is about times. open: the candidates that more turns may choose.
    """

    best: Candidate
    reached: bool
    doubts: list[str]
    more_turns_help: bool
    open: list[Candidate]


def choose(candidates: Sequence[Candidate], goal: Goal) -> Choice:
    """The best candidate for the goal, and whether another might be it by chance."""
    kind, wanted = goal
    if kind == "speedup":
        fits = [c for c in candidates if c.speed_up >= wanted]
        best = min(fits, key=lambda c: (c.loss, -c.speed_up)) if fits else max(candidates, key=lambda c: c.speed_up)
    elif kind == "max_loss":
        fits = [c for c in candidates if c.loss <= wanted]
        best = max(fits, key=lambda c: c.speed_up) if fits else min(candidates, key=lambda c: (c.loss, -c.speed_up))
    else:
        fits = list(candidates)
        best = max(fits, key=_worth)
    if not fits:
        return Choice(best, False, [], False, [best])
    about_time, about_loss, rivals = [], [], []
    if kind == "speedup" and interval(best.ratios, np.median)[0] < wanted * (1 - TIE):
        about_time.append(f"{best.label} may be slower than {wanted:g}×")
    if kind == "max_loss" and interval(list(best.losses.values()))[1] > wanted:
        about_loss.append(f"{best.label} may lose more than {wanted:g} on other inputs")
    for other in candidates:
        if other is best:
            continue
        if kind == "max_loss" and other in fits and not surely_faster(best, other):
            about_time.append(f"{other.label} may be as fast")
            rivals.append(other)
        if kind == "speedup" and other in fits and not surely_nearer(best, other):
            about_loss.append(f"{other.label} may lose as little")
    # What each loses is settled once it ran on all inputs; which are fast enough is not.
    still_open = [best, *rivals] if kind == "max_loss" else list(candidates)
    return Choice(best, True, about_time + about_loss, bool(about_time), still_open)


def _worth(candidate: Candidate) -> float:
    """What a front's chosen point has most of: speed, for each tenth of loss a third less."""
    return float(np.log(candidate.speed_up) - 4 * candidate.loss)


def surely_faster(one: Candidate, other: Candidate) -> bool:
    """Whether a candidate is faster, turn by turn, than chance has it, or both are as fast to within 1 %."""
    turns = min(len(one.ratios), len(other.ratios))
    logs = np.log(one.ratios[-turns:]) - np.log(other.ratios[-turns:])
    low, high = interval(list(logs), np.median)
    return low > 0 or max(abs(low), abs(high)) < TIE


def surely_nearer(one: Candidate, other: Candidate) -> bool:
    """Whether a candidate loses less, input by input, than chance has it, or both lose the same to within 0.001."""
    shared = sorted(one.losses.keys() & other.losses.keys())
    low, high = interval([other.losses[i] - one.losses[i] for i in shared])
    return low > 0 or max(abs(low), abs(high)) < 1e-3


def interval(values: Sequence[float], statistic: Callable[..., Any] = np.mean) -> tuple[float, float]:
    """A statistic's 95 % interval by the bootstrap, with a generator of its own; one value is all there is to say."""
    drawn = np.asarray(values, dtype=float)
    picks = np.random.default_rng(0).integers(0, len(drawn), (RESAMPLES, len(drawn)))
    low, high = np.quantile(statistic(drawn[picks], axis=1), (0.025, 0.975))
    return float(low), float(high)
