"""Depth maps: 16-bit pictures that keep their values, color maps to look at, and how far two of them are apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from ..visualization import LegendEntry, Panel
from ..visualization.palettes import ColorMap, color_table

if TYPE_CHECKING:
    from .loading import LoadedModel

LARGEST = 65535
# Share of the range of depths from which on a difference has the brightest color.
MOST_DIFFERENT = 0.1


class Range(NamedTuple):
    """What the 16-bit values 0 and 65535 stand for; metric: in meters (0 to 65.535), else in the model's own unit."""

    low: float
    high: float
    metric: bool


def depth_map(loaded: LoadedModel, outputs: Any, image: Image.Image) -> np.ndarray:
    """The model's depths at the image's size, float32 [H, W]."""
    size = (image.height, image.width)
    found = loaded.processor.post_process_depth_estimation(outputs, target_sizes=[size])[0]["predicted_depth"]
    return found.float().cpu().numpy().reshape(size)


def is_metric(config: Any) -> bool:
    """Whether a model's depths are meters."""
    return getattr(config, "depth_estimation_type", None) == "metric" or config.model_type == "zoedepth"


def depth_range(depth: np.ndarray, metric: bool) -> Range:
    """Millimeters as they are, where the model gives meters and all lie below 65.5; else from the least to the most."""
    low, high = float(depth.min()), float(depth.max())
    if metric and low >= 0 and high * 1000 <= LARGEST:
        return Range(0.0, LARGEST / 1000, True)
    return Range(low, high, False)


def widen(seen: list[float], depth: np.ndarray) -> None:
    """Makes [least, most] of a clip so far, [] at first, hold another frame's depths: its colors do not flicker."""
    seen[:] = [min([*seen, float(depth.min())]), max([*seen, float(depth.max())])]


def to_16_bits(depth: np.ndarray, limits: Range) -> Image.Image:
    """Depths [H, W] as a 16-bit gray picture: low + value / 65535 · (high - low) are the depths again."""
    return Image.fromarray((_shares(depth, limits.low, limits.high) * LARGEST).round().astype(np.uint16))


def colorize_depth(depth: np.ndarray, low: float, high: float, colors: ColorMap = "viridis") -> Image.Image:
    """Depths [H, W] in the colors of a map, from low to high."""
    return Image.fromarray(color_table(colors)[(_shares(depth, low, high) * 255).round().astype(np.uint8)])


def depth_difference(plain: np.ndarray, reduced: np.ndarray) -> Panel:
    """Where two depth maps [H, W] differ, dark to bright, as a share of the plain depths' range."""
    span = (float(plain.max()) - float(plain.min())) or 1.0
    shares = np.array([[0, MOST_DIFFERENT / 4, MOST_DIFFERENT / 2, MOST_DIFFERENT]])
    colors = np.asarray(colorize_depth(shares, 0, MOST_DIFFERENT, "magma"))[0].tolist()
    texts = [f"{share:.1%}" for share in shares[0]]
    texts[-1] += " of the range or more"
    legend = tuple(LegendEntry((r, g, b), text) for (r, g, b), text in zip(colors, texts, strict=True))
    picture = colorize_depth(np.abs(plain - reduced) / span, 0, MOST_DIFFERENT, "magma")
    return Panel("how far the depths differ", picture, legend=legend)


def _shares(depth: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip((depth.astype(np.float64) - low) / ((high - low) or 1.0), 0, 1)
