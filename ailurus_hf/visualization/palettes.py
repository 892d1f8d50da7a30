"""Colors of classes and clusters."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

Color: TypeAlias = tuple[int, int, int]

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
