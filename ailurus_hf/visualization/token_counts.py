"""How many tokens each cluster stands for, as a heat map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from .arrays import ImageLike, tiled, token_assignment, untiled
from .assignments import draw_borders
from .palettes import color_table
from .sheets import LegendEntry

if TYPE_CHECKING:
    from ..clusters import TokenClusters

# Of all colors: a cluster of so many tokens, or of more, has the brightest. Equal steps are doublings.
MOST_TOKENS = 64


def draw_token_counts(
    image: ImageLike,
    clusters: TokenClusters | torch.Tensor,
    grid: Sequence[int],
    *,
    index: int = 0,
    patch_size: int | None = None,
) -> Image.Image:
    """How many tokens each cluster stands for: dark where tokens were kept, bright where many became one.

    `token_count_legend` says which color is which number; the scale is the same for every picture.

    Args:
        image, clusters, grid, index, patch_size: as in `draw_assignment`; of the image only the size is used.

    Returns:
        A picture of the image's size.

    Raises:
        AiluRusError: as in `draw_assignment`.

    Example:
        status = ailurus_status(model)
        draw_token_counts(photo, status.last_clusters, status.last_grid).save("token_counts.png")
    """
    assignment = token_assignment(clusters, grid, index)
    _, side, crop = tiled(image, grid, patch_size)
    colors = _colors(np.bincount(assignment.ravel()))[assignment]
    picture = colors.repeat(side, axis=0).repeat(side, axis=1)
    draw_borders(picture, assignment.repeat(side, axis=0).repeat(side, axis=1), side)
    return untiled(picture, crop)


def token_count_legend() -> tuple[LegendEntry, ...]:
    """The colors of `draw_token_counts` at each doubling.

    Returns:
        Entries for a `Panel`.

    Example:
        >>> [entry.text for entry in token_count_legend()][:3]
        ['1 token', '2', '4']
    """
    counts = [2**power for power in range(MOST_TOKENS.bit_length())]
    texts = ["1 token", *map(str, counts[1:-1]), f"{counts[-1]}+"]
    colors = [(int(red), int(green), int(blue)) for red, green, blue in _colors(np.array(counts))]
    return tuple(LegendEntry(color, text) for color, text in zip(colors, texts, strict=True))


def _colors(counts: np.ndarray) -> np.ndarray:
    """uint8 [..., 3]."""
    shares = np.log2(counts.clip(1, MOST_TOKENS)) / np.log2(MOST_TOKENS)
    return color_table("viridis")[(shares * 255).round().astype(int)]
