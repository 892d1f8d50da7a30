"""The image rebuilt from one patch a cluster (the paper's Fig. 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from ..errors import AiluRusError
from .arrays import ImageLike, cluster_means, tiled, token_assignment, untiled

if TYPE_CHECKING:
    from ..clusters import TokenClusters


def reconstruct_image(
    image: ImageLike,
    clusters: TokenClusters | torch.Tensor,
    grid: Sequence[int],
    *,
    index: int = 0,
    patch: str = "mean",
    patch_size: int | None = None,
) -> Image.Image:
    """The image rebuilt from one patch a cluster: what the layers after the merge still see (the paper's Fig. 2).

    Args:
        image, clusters, grid, index, patch_size: as in `draw_assignment`.
        patch: "mean", the mean of the cluster's patches, or "center", the patch of its center (the paper).

    Returns:
        A picture of the image's size.

    Raises:
        AiluRusError: as in `draw_assignment`; "center" for clusters whose centers are no tokens.

    Example:
        status = ailurus_status(model)
        reconstruct_image(photo, status.last_clusters, status.last_grid).save("rebuilt.png")
    """
    assignment = token_assignment(clusters, grid, index).reshape(-1)
    pixels, side, crop = tiled(image, grid, patch_size)
    rows, columns = grid
    patches = pixels.reshape(rows, side, columns, side, 3).transpose(0, 2, 1, 3, 4).reshape(rows * columns, -1)
    if patch == "mean":
        patches = cluster_means(patches, assignment, int(assignment.max()) + 1)[assignment]
    elif patch == "center":
        centers = getattr(clusters, "centers", None)
        if centers is None:
            raise AiluRusError('patch="center" needs centers that are tokens, and these clusters have none: use "mean"')
        patches = patches[centers[index].cpu().numpy()[assignment]]
    else:
        raise AiluRusError(f'patch is "mean" or "center", not {patch!r}')
    picture = patches.reshape(rows, columns, side, side, 3).transpose(0, 2, 1, 3, 4)
    return untiled(picture.reshape(pixels.shape).round().astype(np.uint8), crop)
