"""Colors of classes, clusters, differences and values. What tells two things apart is read by the color-blind, too."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np

Color: TypeAlias = tuple[int, int, int]
ColorMap = Literal["viridis", "magma", "gray"]

# What a difference means. Orange and blue stay apart to all kinds of color-blindness, and differ in brightness; what is
# neither is striped. All three stand out from a photograph in pale gray. tests/visualization holds these contrasts.
WORSE: Color = (190, 75, 0)
BETTER: Color = (0, 40, 145)
NEITHER: Color = (25, 25, 25)
# Lines of figures, in the order they are taken: Okabe and Ito's colors but yellow, which is faint on white.
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")

# Nine colors of each of matplotlib's maps; what lies between is interpolated.
COLOR_MAPS: dict[ColorMap, tuple[str, ...]] = {
    "viridis": ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725"),
    "magma": ("000004", "1d1147", "51127c", "832681", "b73779", "e75263", "fc8961", "fec488", "fcfdbf"),
    "gray": ("000000", "ffffff"),
}

# Street scenes are drawn in the colors of the Cityscapes benchmark, which readers of segmentation papers know.
CUSTOMARY_COLORS: dict[str, Color] = {
    "sky": (70, 130, 180),
    "building": (70, 70, 70),
    "pole": (153, 153, 153),
    "road": (128, 64, 128),
    "pavement": (244, 35, 232),
    "sidewalk": (244, 35, 232),
    "tree": (107, 142, 35),
    "vegetation": (107, 142, 35),
    "sign": (220, 220, 0),
    "fence": (190, 153, 153),
    "car": (0, 0, 142),
    "pedestrian": (220, 20, 60),
    "person": (220, 20, 60),
    "bicyclist": (119, 11, 32),
}


def color_table(colors: ColorMap) -> np.ndarray:
    """A color map as uint8 [256, 3], from the lowest value to the highest."""
    table = np.array([[int(color[i : i + 2], 16) for i in (0, 2, 4)] for color in COLOR_MAPS[colors]], dtype=float)
    positions = np.linspace(0, 255, len(table))
    return np.stack([np.interp(np.arange(256), positions, channel) for channel in table.T], axis=1).round().astype("u1")


def distinct_colors(count: int) -> np.ndarray:
    """Colors whose neighbors in the list are far apart in hue.

    Args:
        count: how many.

    Returns:
        uint8 array [count, 3].

    Example:
        >>> distinct_colors(12).shape
        (12, 3)
    """
    colors = []
    for i in range(count):
        hue = (i * 0.61803398875) % 1.0  # the golden ratio never repeats a hue nor comes close soon
        colors.append(colorsys.hsv_to_rgb(hue, (0.85, 0.55, 0.7)[i % 3], (0.95, 0.8, 0.6)[i // 3 % 3]))
    return (np.array(colors).reshape(-1, 3) * 255).round().astype(np.uint8)


def class_palette(class_names: Sequence[str]) -> np.ndarray:
    """A color for each class, the customary one where the name has one.

    Args:
        class_names: in id order.

    Returns:
        uint8 array [classes, 3].

    Example:
        >>> class_palette(["road", "sky"]).tolist()
        [[128, 64, 128], [70, 130, 180]]
    """
    palette = distinct_colors(len(class_names))
    for i, name in enumerate(class_names):
        palette[i] = CUSTOMARY_COLORS.get(name.lower(), palette[i])
    return palette
