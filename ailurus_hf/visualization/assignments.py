"""The assignment of tokens to clusters, drawn on the image (the paper's Fig. 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image

from ..errors import AiluRusError
from .arrays import ImageLike, cluster_means, tiled, token_assignment, untiled
from .palettes import Color, distinct_colors

if TYPE_CHECKING:
    from ..clusters import TokenClusters


# From this gray on a white line would be hard to see.
BRIGHT = 150


def draw_assignment(
    image: ImageLike,
    clusters: TokenClusters | torch.Tensor,
    grid: Sequence[int],
    *,
    index: int = 0,
    fill: str = "mean",
    border: Color | Literal["auto"] | None = "auto",
    patch_size: int | None = None,
) -> Image.Image:
    """The image with every cluster of tokens filled with one color and outlined (the paper's Fig. 2).

    Args:
        image: the image the model saw, [H, W, 3] uint8 or PIL.
        clusters: TokenClusters, or its assignment LongTensor[B, N].
        grid: (rows, columns) of tokens, N in all.
        index: which image of the batch.
        fill: "mean", the cluster's mean color, or "distinct", a color of its own.
        border: color of the outlines, None for none; "auto" is white on dark clusters and black on bright ones.
        patch_size: side of a token in pixels where the image was padded on the right and at the bottom to make
            whole tokens; None where the tokens span the image.

    Returns:
        A picture of the image's size.

    Raises:
        AiluRusError: a grid that does not match the tokens or the image, an index past the batch, an unknown fill.

    Example:
        status = ailurus_status(model)
        draw_assignment(photo, status.last_clusters, status.last_grid).save("assignment.png")
    """
    assignment = token_assignment(clusters, grid, index)
    pixels, side, crop = tiled(image, grid, patch_size)
    cluster_of_pixel = assignment.repeat(side, axis=0).repeat(side, axis=1)
    num_clusters = int(assignment.max()) + 1
    if fill == "mean":
        colors = cluster_means(pixels.reshape(-1, 3), cluster_of_pixel.reshape(-1), num_clusters)
    elif fill == "distinct":
        colors = distinct_colors(num_clusters)
    else:
        raise AiluRusError(f'fill is "mean" or "distinct", not {fill!r}')
    picture = colors.round().astype(np.uint8)[cluster_of_pixel]
    if border is not None:
        draw_borders(picture, cluster_of_pixel, side, border)
    return untiled(picture, crop)


def draw_borders(picture: np.ndarray, regions: np.ndarray, side: int, color: Color | Literal["auto"] = "auto") -> None:
    """Draws lines between regions into a picture.

    Args:
        picture: uint8 [H, W, 3], changed in place.
        regions: the region of each pixel, [H, W].
        side: of a token in pixels; lines are a sixteenth of it wide, so that they survive scaling down.
        color: of the lines; "auto" is white on dark regions and black on bright ones.
    """
    edges = _edges(regions)
    for _ in range(max(1, round(side / 16)) - 1):
        edges[:, 1:] |= edges[:, :-1]
        edges[1:, :] |= edges[:-1, :]
    if color == "auto":
        bright = picture[edges] @ np.array([0.299, 0.587, 0.114]) > BRIGHT
        picture[edges] = np.where(bright[:, None], np.uint8(0), np.uint8(255))
    else:
        picture[edges] = color


def _edges(regions: np.ndarray) -> np.ndarray:
    """True where a pixel's right or lower neighbor belongs to another region."""
    edges = np.zeros(regions.shape, dtype=bool)
    edges[:, :-1] |= regions[:, :-1] != regions[:, 1:]
    edges[:-1, :] |= regions[:-1, :] != regions[1:, :]
    return edges
