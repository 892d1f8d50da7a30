"""How alike two clips are, how steady one is, and how well it keeps to its condition.

Frames are RGB pictures, all of one size; two clips have as many frames.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from PIL import Image

from ..errors import AiluRusError
from ..extras import require
from ..images import to_rgb
from .interpolation import disagreement, optical_flow, warp

Pictures = Sequence[Image.Image]


def psnr(frames: Pictures, others: Pictures) -> float:
    """Peak signal-to-noise ratio of 8-bit colors, over all pixels of all frames.

    Args:
        frames, others: two clips of as many frames of one size.

    Returns:
        Decibels; infinite if equal.

    Example:
        >>> from PIL import Image
        >>> frames = [Image.new("RGB", (64, 48), color) for color in ("black", "gray")]
        >>> psnr(frames, frames)
        inf
    """
    error = np.mean([np.square(a - b).mean() for a, b in _pairs(frames, others)])
    return math.inf if error == 0 else float(-10 * math.log10(error))


def ssim(frames: Pictures, others: Pictures) -> float:
    """Structural similarity (Wang et al. 2004: Gaussian window of σ 1.5), by scikit-image.

    Args:
        frames, others: two clips of as many frames of one size.

    Returns:
        The mean of the frames, 1 if equal.

    Example:
        >>> from PIL import Image
        >>> frames = [Image.new("RGB", (64, 48), color) for color in ("black", "gray")]
        >>> ssim(frames, frames)
        1.0
    """
    metrics = require("skimage.metrics", "bench")
    options = {"channel_axis": -1, "data_range": 1.0, "gaussian_weights": True, "use_sample_covariance": False}
    return float(np.mean([metrics.structural_similarity(a, b, **options) for a, b in _pairs(frames, others)]))


def warping_error(frames: Pictures, motion_of: Pictures | None = None, threshold: float = 1.0) -> float:
    """Mean squared difference of each frame, colors in [0, 1], to the next one warped back to it (Lai et al. 2018).

    Args:
        frames: of the clip.
        motion_of: frames whose optical flow is followed, such as the input clip's; the frames' own if None.
        threshold: pixels that come back further than this from their start, in pixels, are hidden in one of the two
            frames and left out.

    Returns:
        The error; NaN where no pixel is left.

    Raises:
        AiluRusError: fewer than two frames.

    Example:
        >>> from PIL import Image
        >>> frames = [Image.new("RGB", (64, 48), color) for color in ("black", "gray")]
        >>> warping_error([frames[0], frames[0]])
        0.0
    """
    if len(frames) < 2:
        raise AiluRusError(f"a warping error needs at least 2 frames, got {len(frames)}")
    errors = []
    moving = _pairs(frames, frames if motion_of is None else motion_of)
    for (frame, moves), (following, moves_to) in pairwise(moving):
        forth, back = optical_flow(moves, moves_to), optical_flow(moves_to, moves)
        seen = disagreement(forth, back) <= threshold
        y, x = np.indices(seen.shape)
        target = x + forth[..., 0], y + forth[..., 1]
        seen &= (
            (target[0] >= 0) & (target[0] <= seen.shape[1] - 1) & (target[1] >= 0) & (target[1] <= seen.shape[0] - 1)
        )
        errors.append(np.square(frame - warp(following, forth))[seen].reshape(-1))
    all_errors = np.concatenate(errors)
    return float(all_errors.mean()) if all_errors.size else math.nan


def edge_agreement(
    frames: Pictures, edges: Pictures, tolerance: int = 2, low_threshold: int = 100, high_threshold: int = 200
) -> float:
    """F1 of the frames' canny edges against condition pictures, over all frames.

    An edge pixel is met if the other picture has one at most `tolerance` pixels (Euclidean) away. Pixels of a condition
    picture from 128 on are edges.

    Args:
        frames: of the clip.
        edges: condition pictures of the same sizes.
        tolerance: in pixels.
        low_threshold, high_threshold: of canny's gradients, as in OpenCV.

    Returns:
        0 to 1; 1 where neither has any.

    Example:
        >>> from PIL import Image
        >>> frames = [Image.new("RGB", (64, 48), color) for color in ("black", "gray")]
        >>> edge_agreement(frames[:1], frames[:1])
        1.0
    """
    cv2 = require("cv2", "video")
    met = {"precision": 0, "recall": 0}
    total = {"precision": 0, "recall": 0}
    _check(frames, edges)
    for frame, condition in zip(frames, edges):
        drawn = cv2.Canny(np.asarray(to_rgb(frame)), low_threshold, high_threshold) > 0
        wanted = np.asarray(condition.convert("L")) >= 128
        for name, ours, theirs in (("precision", drawn, wanted), ("recall", wanted, drawn)):
            total[name] += int(ours.sum())
            if theirs.any():
                distance = cv2.distanceTransform((~theirs).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
                met[name] += int((distance[ours] <= tolerance + 1e-3).sum())
    if not total["precision"] and not total["recall"]:
        return 1.0
    precision, recall = (met[name] / total[name] if total[name] else 0.0 for name in met)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _pairs(frames: Pictures, others: Pictures) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    _check(frames, others)
    return ((_colors(frame), _colors(other)) for frame, other in zip(frames, others))


def _check(frames: Pictures, others: Pictures) -> None:
    if len(frames) != len(others) or not frames:
        raise AiluRusError(f"two clips of as many frames are compared, got {len(frames)} and {len(others)}")
    for number, (frame, other) in enumerate(zip(frames, others)):
        if frame.size != other.size:
            (width, height), (other_width, other_height) = frame.size, other.size
            raise AiluRusError(f"frame {number} is {width}×{height}, the other {other_width}×{other_height}")


def _colors(frame: Image.Image) -> np.ndarray:
    return np.asarray(to_rgb(frame), dtype=np.float32) / 255
