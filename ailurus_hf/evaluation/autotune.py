"""autotune: the setting for one's own model, inputs and device, found by measuring.

In three stages. The first settings, which differ in location and keep ratio, run on one typical input, and two of them
in every way of clustering and restoring as well. What a way does to time and loss there is foreseen for all the others,
and the likeliest run too. The best of all run on a few inputs, and the best of these on all of them, until the choice
is outside of what chance does or `rounds` are over.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
from torch import nn

from ..errors import AiluRusError
from .left_as_found import left_as_found
from .search import Candidate, Choice, Goal, Measuring, Subject, choose, foresee, interval, survivors, usable
from .timing import measured_on
from .tuned import Tuned, TunedRow

log = logging.getLogger(__name__)

Metric = Callable[[Any, Any], float]
# Of how many settings the two that are tried in every way are the first and the last; how many of the foreseen run; how
# many of the best are tried in every way then.
NEAREST, LIKELIEST, BEST = 12, 16, 2
# How many go on from a stage, and on how many inputs the second one looks.
SECOND, LAST = 10, 4
FEW = 6
# After so many turns more it is asked whether the choice is outside of what chance does.
CHECKED = 8


def autotune(
    target: Any,
    inputs: Sequence[Any],
    *,
    speedup: float | None = None,
    max_loss: float | None = None,
    pareto: bool = False,
    metric: Metric | None = None,
    labels: Sequence[Any] | None = None,
    processor: Any = None,
    candidates: Sequence[Any] | None = None,
    generate: dict[str, Any] | None = None,
    rounds: int = 2,
    progress: bool = True,
    timer: Callable[[], float] = time.perf_counter,
) -> Tuned:
    """Finds the fastest setting within a loss, or the one that loses least at a speed, on this device.

    Loss is what differs from the plain model: the share of other labels, 1 - the cosine of features, the relative
    difference of depth, or the root mean square difference of pictures. Speed is measured in turns with the plain
    model.

    Args:
        target: a transformers model or a diffusers pipeline with AiluRus off; it is left as it was.
        inputs: what it runs on, each alone. For a model: images (with `processor`), Tensor[B, 3, H, W], or mappings of
            the forward's arguments. For a pipeline: prompts, or mappings of its call's arguments. 8 to 32 are enough.
        speedup: the least speed-up, such as 2.0: the setting that loses least is chosen.
        max_loss: the greatest loss, such as 0.01: the fastest setting is chosen.
        pareto: no limit: the front of speed and loss; the chosen one is its bend.
        metric: a score of an output and its label, higher is better; loss is then what it falls by.
        labels: one for each input, for `metric`.
        processor: makes a model's inputs of images.
        candidates: configs to choose from, instead of a search over all.
        generate: of a pipeline, further arguments of its call, such as {"num_inference_steps": 20}.
        rounds: how often all inputs are run at most, where the choice may be chance.
        progress: whether to show a bar.
        timer: a clock in seconds.

    Returns:
        A `Tuned`: `.best`, `.apply(model)`, `.plot()`, `.save("tuned.json")`; printed, it is a table. After an
        interrupt from the keyboard, what was found until then.

    Raises:
        UnsupportedModelError: nothing in the target can be reduced.
        AiluRusError: not exactly one goal is given, there are no inputs, or AiluRus is on already.

    Example:
        tuned = autotune(model, images, processor=processor, max_loss=0.01)
        print(tuned)
        tuned.apply(model)
    """
    goal = goal_of(speedup, max_loss, pareto)
    if not len(inputs):
        raise AiluRusError("inputs has none: give at least one, 8 to 32 for a choice that holds")
    if labels is not None and len(labels) != len(inputs):
        raise AiluRusError(f"there are {len(inputs)} inputs and {len(labels)} labels: give one for each")
    if labels is not None and metric is None:
        raise AiluRusError("labels are for a metric: give metric=, a function of an output and its label")
    if rounds < 1:
        raise AiluRusError(f"rounds must be at least 1, got {rounds}")
    score = None if metric is None else _scored(metric, labels)
    if isinstance(target, nn.Module):
        from .tuned_models import ModelSubject

        subject: Subject = ModelSubject(target, inputs, processor, score)
    else:
        from .tuned_pipelines import PipelineSubject

        subject = PipelineSubject(target, inputs, generate or {}, score)
    given = None if candidates is None else [Candidate(config, str(config)) for config in candidates]
    return tune(subject, goal, given, rounds, progress, timer)


def tune(
    subject: Subject,
    goal: Goal,
    candidates: Sequence[Candidate] | None = None,
    rounds: int = 2,
    progress: bool = True,
    timer: Callable[[], float] = time.perf_counter,
) -> Tuned:
    """`autotune` of a subject; arguments as there."""
    with left_as_found(subject.target):
        return _tune(subject, goal, candidates, rounds, progress, timer)


def _tune(
    subject: Subject,
    goal: Goal,
    candidates: Sequence[Candidate] | None,
    rounds: int,
    progress: bool,
    timer: Callable[[], float],
) -> Tuned:
    from tqdm.auto import tqdm

    first = usable(subject.target, subject.first() if candidates is None else candidates)
    tried, last, interrupted = list(first), first, False
    with tqdm(desc="autotune", unit=" runs", disable=not progress) as bar:
        measuring = Measuring(subject, timer, bar.update)
        try:
            order = _typical_first(measuring, first[len(first) // 2])
            measuring.turn(first, order[0])
            if candidates is None:
                _try_ways(subject, measuring, first, goal, order[0], tried)
            last = survivors(tried, goal, SECOND, 0.15)
            for number, index in enumerate(order[1 : 1 + FEW]):
                measuring.turn(last, index, backwards=bool(number % 2))
            _forget_first_turn(last)
            last = survivors(last, goal, LAST, 0.05)
            for number, index in enumerate(order[1 + FEW :]):
                measuring.turn(last, index, backwards=bool(number % 2))
            still_open = last
            for number in range((rounds - 1) * subject.num_inputs):
                if number % CHECKED == 0:
                    choice = choose(still_open, goal)
                    if not (choice.doubts and choice.more_turns_help):
                        break
                    still_open = choice.open
                measuring.turn(still_open, number % subject.num_inputs, backwards=bool(number % 2))
            choice = choose(still_open, goal)
        except KeyboardInterrupt:
            last = [candidate for candidate in tried if candidate.losses]
            if not last:
                raise
            most = max(len(candidate.losses) for candidate in last)
            last, interrupted = [candidate for candidate in last if len(candidate.losses) == most], True
            choice = choose(last, goal)
    return _result(subject, goal, choice, last, len(tried), interrupted)


def _typical_first(measuring: Measuring, candidate: Candidate) -> list[int]:
    """The numbers of the inputs, before all the one of the first few on which a setting loses about what it loses on
    them together. What depends on an input's size alone is made here, so nothing of these turns is kept."""
    inputs = range(measuring.subject.num_inputs)
    for index in inputs[:FEW]:
        measuring.turn([candidate], index)
    losses, mean = candidate.losses, candidate.loss
    typical = min(losses, key=lambda index: abs(losses[index] - mean))
    candidate.ratios, candidate.seconds, candidate.losses = [], [], {}
    return [typical, *(index for index in inputs if index != typical)]


def _try_ways(
    subject: Subject,
    measuring: Measuring,
    first: Sequence[Candidate],
    goal: Goal,
    index: int,
    tried: list[Candidate],
) -> None:
    """Measures, on the input of a number, two of the first settings in every way, others where those ways promise most,
    then the best of all in every way, and what is best then with every location and keep ratio.

    tried: those that ran, `first` until then; the others are added.
    """
    ways = {one: _usable_or_none(subject.target, subject.variants(one)) for one in first}
    bases = {each: one for one, variants in ways.items() for each in (one, *variants)}
    nearest = [one for one in survivors(first, goal, NEAREST, 0.1) if ways[one]]
    probed = {one: ways[one] for one in (*nearest[:1], *nearest[-1:])}
    for variants in probed.values():
        _run(measuring, variants, index, tried)
    known = {each.way for variants in probed.values() for each in variants}
    foreseen = {
        one: [each for each in variants if each.way in known] for one, variants in ways.items() if one not in probed
    }
    for one, variants in foreseen.items():
        foresee(variants, one, probed)
    every = [each for variants in foreseen.values() for each in variants]
    likeliest = survivors(every, goal, LIKELIEST, 0.25)
    for each in every:
        each.ratios, each.losses = [], {}
    _run(measuring, likeliest, index, tried)
    best = {bases[each] for each in survivors(tried, goal, BEST, 0.1)}
    others = [each for one in first if one in best for each in ways[one] if not each.losses]
    _run(measuring, others, index, tried)
    way = choose(tried, goal).best.way
    others = [each for one in first for each in ways[one] if each.way == way and not each.losses]
    _run(measuring, others, index, tried)


def _run(measuring: Measuring, candidates: list[Candidate], index: int, tried: list[Candidate]) -> None:
    tried += candidates
    if candidates:
        measuring.turn(candidates, index)


def goal_of(speedup: float | None, max_loss: float | None, pareto: bool) -> Goal:
    """The goal of the three arguments; raises AiluRusError where not exactly one is given, or out of range."""
    goals = {"speedup": speedup, "max_loss": max_loss, "pareto": pareto or None}
    given = [name for name, value in goals.items() if value is not None]
    if len(given) != 1:
        raise AiluRusError(f"give exactly one of speedup, max_loss and pareto=True, got {', '.join(given) or 'none'}")
    if speedup is not None:
        if not speedup > 1:
            raise AiluRusError(f"speedup must be above 1, got {speedup}")
        return "speedup", float(speedup)
    if max_loss is not None:
        if not max_loss >= 0:
            raise AiluRusError(f"max_loss must be at least 0, got {max_loss}")
        return "max_loss", float(max_loss)
    return "pareto", 0.0


def _scored(metric: Metric, labels: Sequence[Any] | None) -> Callable[[Any, int], float]:
    return lambda output, index: float(metric(output, None if labels is None else labels[index]))


def _usable_or_none(target: Any, candidates: list[Candidate]) -> list[Candidate]:
    try:
        return usable(target, candidates)
    except AiluRusError:
        return []


def _forget_first_turn(candidates: Sequence[Candidate]) -> None:
    """The first time of a setting is longer than later ones; it is kept where it is the only one."""
    for candidate in candidates:
        if len(candidate.ratios) > 1:
            del candidate.ratios[0], candidate.seconds[0]


def _result(
    subject: Subject, goal: Goal, choice: Choice, last: Sequence[Candidate], num_tried: int, interrupted: bool
) -> Tuned:
    ordered = sorted(last, key=lambda candidate: -candidate.speed_up)
    kind, wanted = goal
    notes = [] if choice.reached else [f"No setting reaches {kind} {wanted:g}: the nearest one is chosen."]
    if choice.reached and choice.best.speed_up < 1:
        notes.append("It is slower than the plain model: there are too few tokens, or layers, for reduction to pay.")
    if choice.doubts:
        notes.append(f"The choice may be chance: {'; '.join(choice.doubts)}.")
    if interrupted:
        notes.append("The search was interrupted.")
    return Tuned(
        rows=[_row(candidate) for candidate in ordered],
        chosen=ordered.index(choice.best),
        goal={kind: True if kind == "pareto" else wanted},
        reached=choice.reached,
        confident=choice.reached and not choice.doubts and not interrupted,
        note=" ".join(notes),
        loss_means=getattr(subject, "loss_means", ""),
        num_tried=num_tried,
        interrupted=interrupted,
        measured_on=measured_on(subject.device, getattr(subject, "precision", "float32")),
    )


def _row(candidate: Candidate) -> TunedRow:
    speed, loss = interval(candidate.ratios, np.median), interval(list(candidate.losses.values()))
    return TunedRow(
        candidate.config,
        candidate.label,
        1e3 * median(candidate.seconds),
        candidate.speed_up,
        *speed,
        candidate.loss,
        *loss,
        len(candidate.losses),
    )
