"""A batch as frames of a video: which frames they are, whose keys each takes, and clusters over space and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..clusters import TokenClusters
from ..errors import AiluRusError

# What a frame attends to: all frames (ControlVideo), the first and the previous one (Tune-A-Video), the first
# (Text2Video-Zero), itself, or the first two of the batch (a clip's key frames, where the batch begins with them).
MODES = ("full", "sparse_causal", "first", "own", "first_two")


@dataclass(frozen=True)
class Frames:
    """The F frames that a batch holds, once or, under classifier-free guidance, twice.

    Args:
        numbers: their numbers in the video.
        sources: for each frame, which frames it attends to, as indices into `numbers`; the same count for each frame.
    """

    numbers: tuple[int, ...]
    sources: tuple[tuple[int, ...], ...]

    @classmethod
    def attending(cls, mode: str, numbers: Sequence[int]) -> Frames:
        """Frames that attend to one another in one of MODES."""
        count = len(numbers)
        if mode not in MODES:
            raise AiluRusError(f"cross_frame must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
        if count < 1 or (mode == "first_two" and count < 2):
            raise AiluRusError(f"mode {mode!r} needs at least {1 + (mode == 'first_two')} frames, got {count}")
        sources = {
            "full": lambda frame: tuple(range(count)),
            "sparse_causal": lambda frame: (0, max(frame - 1, 0)),
            "first": lambda frame: (0,),
            "own": lambda frame: (frame,),
            "first_two": lambda frame: (0, 1),
        }[mode]
        return cls(tuple(numbers), tuple(map(sources, range(count))))

    @property
    def count(self) -> int:
        return len(self.numbers)

    @property
    def all_joined(self) -> bool:
        """Whether every frame attends to all."""
        return all(row == tuple(range(self.count)) for row in self.sources)

    def videos(self, batch: int) -> int:
        """How many videos of these frames a batch holds; raises AiluRusError where it is no whole number."""
        if batch % self.count:
            raise AiluRusError(f"a batch of {self.count} frames, or of twice as many, was expected, got {batch} images")
        return batch // self.count


@dataclass(eq=False)
class JointClusters:
    """Clusters of whole videos, for a batch of frames: merges [B, N, C] to [B, M, C], and unmerges.

    The F * M representatives of a video are laid out as F rows of M, so that blocks see a batch of F frames as before.
    A row belongs to no frame: what differs between the frames of a batch (such as prompts) must not reach it.

    Args:
        clusters: F * M clusters of each video's F * N tokens.
        frames: F.
    """

    clusters: TokenClusters
    frames: int

    def merge(self, tokens: Tensor) -> Tensor:
        return self._by_frame(self.clusters.merge(self._by_video(tokens)))

    def unmerge(self, representatives: Tensor) -> Tensor:
        return self._by_frame(self.clusters.unmerge(self._by_video(representatives)))

    def log_counts(self) -> Tensor:
        return self._by_frame(self.clusters.log_counts())

    def _by_video(self, rows: Tensor) -> Tensor:
        return rows.reshape(-1, self.frames * rows.shape[1], rows.shape[2])

    def _by_frame(self, values: Tensor) -> Tensor:
        return values.reshape(values.shape[0] * self.frames, -1, *values.shape[2:])


Clusters = TokenClusters | JointClusters

# By grid, M, batch, the numbers of the frames of a video, and the stack ("" where all stacks of a resolution share).
Assignments = dict[tuple[tuple[int, ...], int, int, tuple[int, ...] | None, str], Clusters]
