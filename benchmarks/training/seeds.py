"""Runs that differ in their seeds alone: how far apart they are, and how far behind other runs of the same seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence


def spread(scores: Sequence[float]) -> float | None:
    """The best less the worst; None of one run."""
    return max(scores) - min(scores) if len(scores) > 1 else None


def mean_behind(reference: Mapping[int, float], scores: Iterable[tuple[int, float]]) -> float | None:
    """What scores lack of the reference of their seed, in the mean; None where no seed is the same.

    reference: the score of each seed. scores: seeds and scores.
    """
    behind = [reference[seed] - score for seed, score in scores if seed in reference]
    return statistics.fmean(behind) if behind else None
