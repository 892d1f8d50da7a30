"""How sure a score over images is: intervals by bootstrap, of scores and of differences on the same images.

The images are drawn anew, as many as there are, with replacement; a score is computed from what the drawn images'
counts sum to, as it is for the data set itself. Two models are compared on the same draws, so that what is hard for
both is no difference. Intervals are percentiles. They say how much the choice of images matters, and nothing of what
another training would give.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

LEVEL = 0.95
BY_CHANCE = "may be chance"


def drawn_weights(num_images: int, num_resamples: int, generator: np.random.Generator) -> np.ndarray:
    """How often each image is in each resample: [resamples, images], each row of them adds up to the images."""
    drawn = generator.integers(num_images, size=(num_resamples, num_images))
    weights = np.zeros((num_resamples, num_images))
    np.add.at(weights, (np.arange(num_resamples)[:, None], drawn), 1)
    return weights


def resampled_scores(counts: np.ndarray, weights: np.ndarray, score: Callable[[np.ndarray], float]) -> np.ndarray:
    """The score of every resample. counts: of each image, [images, ...]; one sum of them a resample."""
    sums = (weights @ counts.reshape(len(counts), -1)).reshape(-1, *counts.shape[1:])
    return np.array([score(each) for each in sums])


def interval(values: np.ndarray, level: float = LEVEL) -> list[float]:
    """The two percentiles between which that share of the values lies."""
    rest = 50 * (1 - level)
    low, high = np.percentile(values, [rest, 100 - rest])
    return [float(low), float(high)]


def called(between: list[float], above: str, below: str) -> str:
    """What a difference may be called: one of the two words where its interval leaves out 0."""
    low, high = between
    return above if low > 0 else below if high < 0 else BY_CHANCE
