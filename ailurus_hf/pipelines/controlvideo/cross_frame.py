"""Cross-frame attention: frames are the batch, and self-attention takes the keys and values of other frames too.

    with CrossFrameAttention(unet, Frames.attending("full", range(8))):
        unet(latents, timestep, encoder_hidden_states)      # latents of 8 frames, or of 2 x 8 under guidance

No model code is copied: only the processors of self-attention are replaced, for a `with` block. Under AiluRus a frame
attends to the representatives of other frames, each weighted by its count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...clusters import TokenClusters
from ...config import AiluRusDiffusionConfig
from ...diffusion.backend import attend
from ...diffusion.frames import Frames, JointClusters
from ...diffusion.processor import AiluRusProcessor
from ...diffusion.stacks import find_stacks, self_attentions
from ...errors import AiluRusError


class CrossFrameProcessor(AiluRusProcessor):
    """Self-attention over the frames of a batch; cross-attention stays per frame.

    Args:
        frames: which frames each half of the batch holds, and which of them a frame attends to.
        frames_at_once: how many frames are queries at a time; None: all. The result is the same. It limits memory
            where no fused kernel can be used.
        stands_for: the AiluRusProcessor that the layer had, whose clusters are used; None: nothing is merged here
            (stacks that run merged give their counts as the attention mask).
    """

    def __init__(
        self,
        frames: Frames | None = None,
        *,
        frames_at_once: int | None = None,
        stands_for: AiluRusProcessor | None = None,
    ) -> None:
        super().__init__(source=NoClusters() if stands_for is None else stands_for.source)
        if frames_at_once is not None and frames_at_once < 1:
            raise AiluRusError(f"frames_at_once must be at least 1, got {frames_at_once}")
        self.frames = frames or Frames.attending("own", [0])
        self.frames_at_once = frames_at_once
        self.stands_for = stands_for
        if stands_for is not None:
            self._attention_backend = stands_for._attention_backend

    def _attention(
        self,
        attn: Any,
        asking: Tensor,
        answering: Tensor,
        mask: Tensor | None,
        clusters: TokenClusters | JointClusters | None,
    ) -> Tensor:
        if attn.is_cross_attention:
            return super()._attention(attn, asking, answering, mask, clusters)
        bias = None if clusters is None else clusters.log_counts()
        if mask is not None:
            if mask.numel() != answering.shape[0] * answering.shape[1]:
                raise AiluRusError(
                    f"a mask over frames must be one number a key, ({answering.shape[0]}, 1, {answering.shape[1]}), "
                    f"got {tuple(mask.shape)}"
                )
            bias = mask.reshape(answering.shape[:2])
        query, key, value = self._projected(attn, asking, answering)
        out = attend_frames(
            query, key, value, self.frames, key_bias=bias, at_once=self.frames_at_once, backend=self._attention_backend
        )
        return self._output(attn, out)


class NoClusters:
    """Leaves every layer as it is."""

    config = AiluRusDiffusionConfig(scope="attention")

    def assigned(self, layer: nn.Module, tokens: Tensor) -> None:
        return None


def attend_frames(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    frames: Frames,
    *,
    key_bias: Tensor | None = None,
    at_once: int | None = None,
    backend: Any = None,
) -> Tensor:
    """Attention over frames: Tensor[V·F, heads, L, D], and M keys and values a frame; key_bias: Tensor[V·F, M]."""
    count, videos = frames.count, frames.videos(query.shape[0])
    heads, width = query.shape[1], value.shape[3]
    # As they come from the projections, [V, F, L, heads, D]: the tokens of all frames follow one another.
    query, key, value = (part.transpose(1, 2).unflatten(0, (videos, count)) for part in (query, key, value))
    if key_bias is not None:
        key_bias = key_bias.unflatten(0, (videos, count))
    alone = tuple((frame,) for frame in range(count))

    def taken(part: Tensor, rows: tuple[tuple[int, ...], ...]) -> Tensor:
        """The keys of the frames in each row: [V, F, M, ...] to [V · rows, K · M, ...]."""
        if rows == (tuple(range(count)),):
            return part.flatten(1, 2)
        if rows == alone:
            return part.flatten(0, 1)
        return torch.stack([torch.cat([part[:, frame] for frame in row], 1) for row in rows], 1).flatten(0, 1)

    out = []
    for first in range(0, count, at_once or count):
        chunk = slice(first, first + (at_once or count))
        rows = frames.sources[chunk]
        # Frames with the same keys are one sequence of queries.
        rows = rows[:1] if len(set(rows)) == 1 else rows
        asking = query[:, chunk].reshape(videos * len(rows), -1, heads, query.shape[-1])
        answer = attend(
            asking.transpose(1, 2),
            taken(key, rows).transpose(1, 2),
            taken(value, rows).transpose(1, 2),
            key_bias=None if key_bias is None else taken(key_bias, rows),
            backend=backend,
        )
        out.append(answer.transpose(1, 2).reshape(videos, -1, query.shape[2], heads, width))
    return torch.cat(out, 1).flatten(0, 1).transpose(1, 2)


class CrossFrameAttention:
    """Context manager: inside it, self-attention of a UNet or ControlNet is over frames. Reusable, not reentrant.

    On exit the layers get the processors that they had.
    """

    def __init__(self, network: nn.Module, frames: Frames, *, frames_at_once: int | None = None) -> None:
        self.layers: list[Any] = list(self_attentions(find_stacks(network)).values())
        self.frames, self.frames_at_once = frames, frames_at_once
        self.before: list[Any] = []

    def __enter__(self) -> None:
        self.before = [layer.processor for layer in self.layers]
        made: dict[Any, CrossFrameProcessor] = {}
        for layer in self.layers:
            reducing = layer.processor if isinstance(layer.processor, AiluRusProcessor) else None
            if reducing not in made:
                made[reducing] = CrossFrameProcessor(
                    self.frames, frames_at_once=self.frames_at_once, stands_for=reducing
                )
            layer.set_processor(made[reducing])

    def __exit__(self, *exception: object) -> None:
        for layer, processor in zip(self.layers, self.before, strict=True):
            layer.set_processor(processor)
