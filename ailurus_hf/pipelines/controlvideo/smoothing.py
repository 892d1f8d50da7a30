"""The interleaved-frame smoother of ControlVideo (arXiv 2305.13077, section 3.2): flicker leaves by interpolation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import AiluRusError

if TYPE_CHECKING:
    from ...video.interpolation import Interpolator


def interleaved(count: int, step: int) -> list[int]:
    """The frames that a step replaces: every second inner frame; odd ones at even steps, even ones at odd steps."""
    return list(range(1 if step % 2 == 0 else 2, count - 1, 2))


def smoothed(
    clean: Tensor,
    step: int,
    interpolator: Interpolator,
    decode: Callable[[Tensor], Tensor],
    encode: Callable[[Tensor], Tensor],
) -> Tensor:
    """Replaces every second frame by what an interpolator makes of its neighbors; the others keep their latents.

    Args:
        clean: predicted clean latents, Tensor[F, C, h, w].
        step: the denoising step, which says whether odd or even frames are replaced.
        interpolator: the frame half way between two.
        decode, encode: between latents and pictures in [0, 1].
    """
    replaced = interleaved(len(clean), step)
    if not replaced:
        return clean
    beside = [frame for frame in range(len(clean)) if frame - 1 in replaced or frame + 1 in replaced]
    pictures = decode(clean[beside])
    row = {frame: number for number, frame in enumerate(beside)}
    before, after = (pictures[[row[frame + side] for frame in replaced]] for side in (-1, 1))
    between = interpolator(before, after)
    if between.shape != before.shape:
        raise AiluRusError(
            f"interpolator must return frames of shape {tuple(before.shape)}, got {tuple(between.shape)}"
        )
    result = clean.clone()
    result[torch.tensor(replaced, device=clean.device)] = encode(between.clamp(0, 1)).to(clean.dtype)
    return result
