"""Checks of settings and features, with the number that was wrong and the ones that would be right."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import AiluRusError

if TYPE_CHECKING:
    from torch import Tensor


def check_features(features: Tensor, check_finite: bool) -> None:
    if features.ndim != 3 or not features.is_floating_point() or features.shape[1] < 1 or features.shape[2] < 1:
        raise AiluRusError(
            f"features must be a float tensor of shape (B, N, C), got {tuple(features.shape)} of {features.dtype}"
        )
    if check_finite and not features.isfinite().all():
        wrong = int((~features.isfinite()).any(-1).sum())
        raise AiluRusError(f"features of {wrong} of {features.shape[0] * features.shape[1]} tokens are not finite")


def check_num_clusters(num_clusters: int, num_tokens: int) -> None:
    if not 1 <= num_clusters <= num_tokens:
        raise AiluRusError(f"num_clusters must be between 1 and the {num_tokens} tokens, got {num_clusters}")


def check_settings(num_spatial_neighbors: int, alpha: float, num_density_neighbors: int) -> None:
    if num_spatial_neighbors < 0:
        raise AiluRusError(f"num_spatial_neighbors must be 0 (no spatial term) or more, got {num_spatial_neighbors}")
    if not 0 <= alpha <= 1:
        raise AiluRusError(f"alpha must be between 0 and 1, got {alpha}")
    if num_density_neighbors < 1:
        raise AiluRusError(f"num_density_neighbors must be at least 1, got {num_density_neighbors}")
