"""Pictures and label maps as arrays, and pictures cut into one square a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from PIL import Image

from ..errors import AiluRusError
from ..images import to_rgb

if TYPE_CHECKING:
    from ..clusters import TokenClusters

ImageLike: TypeAlias = "Image.Image | np.ndarray"
LabelMap: TypeAlias = "torch.Tensor | np.ndarray | Image.Image"


def pixel_array(image: ImageLike) -> np.ndarray:
    if isinstance(image, Image.Image):
        return np.asarray(to_rgb(image))
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise AiluRusError(f"an image is PIL or a uint8 array [H, W, 3], not {image.dtype} {list(image.shape)}")
    return image


def label_array(label_map: LabelMap) -> np.ndarray:
    labels = label_map.cpu().numpy() if isinstance(label_map, torch.Tensor) else np.asarray(label_map)
    if labels.ndim != 2:
        raise AiluRusError(f"a label map is [H, W], not {list(labels.shape)}")
    return labels.astype(np.int64)


def check_size(photo: Image.Image, labels: np.ndarray, what: str) -> None:
    if labels.shape != (photo.height, photo.width):
        raise AiluRusError(f"the {what} is {list(labels.shape)}, the image {[photo.height, photo.width]}")


def token_assignment(clusters: TokenClusters | torch.Tensor, grid: Sequence[int], index: int) -> np.ndarray:
    """The cluster of each token of one image, [rows, columns]."""
    assignment = clusters if isinstance(clusters, torch.Tensor) else clusters.assignment
    batch, tokens = assignment.shape
    if len(grid) != 2 or grid[0] * grid[1] != tokens:
        raise AiluRusError(
            f"a picture of {tokens} tokens needs a grid of two sides with that product, not {tuple(grid)}"
        )
    if not 0 <= index < batch:
        raise AiluRusError(f"index {index} is outside the batch of {batch}")
    return assignment[index].cpu().numpy().reshape(grid[0], grid[1])


def tiled(
    image: ImageLike, grid: Sequence[int], patch_size: int | None
) -> tuple[np.ndarray, int, tuple[int, int, bool]]:
    """The image brought to a whole number of pixels a token, that number, and what `untiled` needs to go back."""
    pixels = pixel_array(image)
    height, width = pixels.shape[:2]
    rows, columns = grid
    if patch_size is None:
        side = max(1, round(max(height / rows, width / columns)))
        resized = Image.fromarray(pixels).resize((columns * side, rows * side), Image.Resampling.BICUBIC)
        return np.asarray(resized), side, (height, width, True)
    below, right = rows * patch_size - height, columns * patch_size - width
    if below < 0 or right < 0:
        raise AiluRusError(
            f"{rows}×{columns} tokens of {patch_size} pixels cover {rows * patch_size}×{columns * patch_size}, "
            f"less than the image's {height}×{width}"
        )
    return np.pad(pixels, ((0, below), (0, right), (0, 0)), mode="edge"), patch_size, (height, width, False)


def untiled(picture: np.ndarray, original: tuple[int, int, bool]) -> Image.Image:
    height, width, resized = original
    result = Image.fromarray(picture)
    if not resized:
        return result.crop((0, 0, width, height))
    return result.resize((width, height), Image.Resampling.NEAREST)


def cluster_means(values: np.ndarray, cluster: np.ndarray, num_clusters: int) -> np.ndarray:
    """Means of values [N, D] over the clusters [N]: [M, D]; an empty cluster's is 0."""
    counts = np.bincount(cluster, minlength=num_clusters).clip(min=1)
    sums = [np.bincount(cluster, weights=column, minlength=num_clusters) for column in values.T]
    return np.stack(sums, axis=1) / counts[:, None]
