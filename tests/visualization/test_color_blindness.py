"""What tells things apart does so for the color-blind: contrasts under simulated kinds of color-blindness."""

import itertools

import numpy as np
import pytest

from ailurus_hf.visualization import token_count_legend
from ailurus_hf.visualization.differences import faint
from ailurus_hf.visualization.palettes import BETTER, LINES, NEITHER, WORSE

# Of linear RGB, severity 1.0: Machado, Oliveira and Fernandes 2009, "A physiologically-based model".
SIGHTS = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
# CIE76: from about 2 on a difference is seen side by side; patches of a few pixels need far more.
APART = 25


def linear(color) -> np.ndarray:
    value = np.asarray(color, dtype=float) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def seen(color, sight: str) -> np.ndarray:
    """Linear RGB as someone of that sight has it."""
    return np.clip(np.asarray(SIGHTS[sight]) @ linear(color), 0, 1)


def contrast(one, other, sight: str) -> float:
    """WCAG's ratio of luminances, 1 to 21."""
    dark, bright = sorted(float(TO_XYZ[1] @ seen(color, sight)) for color in (one, other))
    return (bright + 0.05) / (dark + 0.05)


def distance(one, other, sight: str) -> float:
    """Between colors in CIELAB."""

    def lab(color):
        ratios = TO_XYZ @ seen(color, sight) / TO_XYZ.sum(1)
        f = np.where(ratios > 0.008856, np.cbrt(ratios), 7.787 * ratios + 16 / 116)
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    return float(np.linalg.norm(lab(one) - lab(other)))


@pytest.mark.parametrize("sight", SIGHTS)
def test_differences_stand_out_from_the_photograph_and_from_each_other(sight: str) -> None:
    darkest = faint(np.zeros((1, 1, 3), dtype=np.uint8))[0, 0]
    for color in (WORSE, BETTER, NEITHER):
        assert contrast(color, darkest, sight) >= 3  # WCAG 1.4.11: of graphics
    for one, other in itertools.combinations((WORSE, BETTER, NEITHER), 2):
        assert distance(one, other, sight) >= APART
    # On gray paper, too.
    assert contrast(WORSE, BETTER, sight) >= 1.5


def test_red_and_green_would_not_pass() -> None:
    """The colors of before, to see that the measure sees."""
    assert distance((230, 30, 30), (30, 200, 60), "normal") > 100
    assert contrast((250, 200, 0), (153, 153, 153), "deuteranopia") < 3
    assert min(distance((170, 110, 0), (120, 130, 0), sight) for sight in SIGHTS) < APART


@pytest.mark.parametrize("sight", SIGHTS)
def test_token_counts_get_brighter(sight: str) -> None:
    colors = [entry.color for entry in token_count_legend()]
    bright = [float(TO_XYZ[1] @ seen(color, sight)) for color in colors]
    assert bright == sorted(bright)
    assert min(distance(*pair, sight) for pair in itertools.pairwise(colors)) > 8


@pytest.mark.parametrize("sight", SIGHTS)
def test_the_first_lines_of_figures_are_told_apart(sight: str) -> None:
    colors = [[int(line[i : i + 2], 16) for i in (1, 3, 5)] for line in LINES[:3]]
    assert min(distance(*pair, sight) for pair in itertools.combinations(colors, 2)) > 12
