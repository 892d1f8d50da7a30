"""Control frames in whatever form they come: checked, and as a list of pictures or one tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import PIL.Image
from torch import Tensor

from ailurus_hf.errors import AiluRusError
from ailurus_hf.images import to_rgb


def as_frames(given: Any) -> Tensor | list[PIL.Image.Image]:
    """The frames for one ControlNet.

    Args:
        given: Tensor[F, 3, H, W] in [0, 1]; or PIL images: a list, any iterable such as a `Clip` or a generator, or
            one.

    Returns:
        The tensor, or the images in a list, RGB with 8 bits a channel.

    Raises:
        AiluRusError: something else, no frame, values that are not in [0, 1], images of several sizes.
    """
    if isinstance(given, Tensor):
        if given.ndim != 4 or given.shape[1] != 3 or not given.is_floating_point():
            raise AiluRusError(
                f"control_frames must be a float Tensor[F, 3, H, W], got {tuple(given.shape)} of {given.dtype}"
            )
        _check_count(len(given))
        if given.min() < 0 or given.max() > 1:
            raise AiluRusError(
                f"control_frames must be in [0, 1], got {given.min().item():.4g} to {given.max().item():.4g}"
            )
        return given
    if isinstance(given, PIL.Image.Image):
        given = [given]
    if not isinstance(given, Iterable):
        raise AiluRusError(f"control_frames must be PIL images or one Tensor[F, 3, H, W], got {type(given).__name__}")
    frames = list(given)
    _check_count(len(frames))
    wrong = [type(frame).__name__ for frame in frames if not isinstance(frame, PIL.Image.Image)]
    if wrong:
        raise AiluRusError(f"control_frames must be PIL images or one Tensor[F, 3, H, W], got {wrong[0]}")
    sizes = {frame.size for frame in frames}
    if len(sizes) > 1:
        raise AiluRusError(f"control_frames must be of one size, got {sorted(sizes)}")
    return [to_rgb(frame) for frame in frames]


def _check_count(count: int) -> None:
    if count == 0:
        raise AiluRusError("control_frames must be at least 1 frame, got 0")
