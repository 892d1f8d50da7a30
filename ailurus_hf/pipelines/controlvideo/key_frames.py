"""The hierarchical sampler of ControlVideo (arXiv 2305.13077, section 3.3): key frames, then the clips between."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from ...diffusion.frames import Frames


@dataclass(frozen=True)
class FrameGroup:
    """Frames that are denoised together.

    Args:
        frames: their numbers, and which of them a frame attends to.
        kept: indices into `frames.numbers` of the frames whose prediction is used.
    """

    frames: Frames
    kept: list[int]


def parts_of(count: int, cross_frame: str, clip_length: int | None) -> list[FrameGroup]:
    """A whole video, or its key frames and then, for each two, those two and the frames between them.

    Args:
        count: frames of the video.
        cross_frame: what frames that are denoised together attend to.
        clip_length: frames of a clip, its two key frames included; None: no clips. The frames of a clip attend to its
            two key frames, whose own prediction is the one made among the key frames.
    """
    if clip_length is None or count <= clip_length:
        return [FrameGroup(Frames.attending(cross_frame, range(count)), list(range(count)))]
    keys = [*range(0, count - 1, clip_length - 1), count - 1]
    parts = [FrameGroup(Frames.attending(cross_frame, keys), list(range(len(keys))))]
    for left, right in pairwise(keys):
        between = range(left + 1, right)
        if between:
            clip = Frames.attending("first_two", [left, right, *between])
            parts.append(FrameGroup(clip, list(range(2, clip.count))))
    return parts
