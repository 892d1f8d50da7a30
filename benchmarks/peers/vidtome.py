"""VidToMe (Li et al. 2024, arXiv 2312.10656): self-attention over frames whose alike tokens are merged across time.

Frames are taken in chunks of four. In a chunk one frame, chosen at random, is the target; of the tokens of the others,
the `local_ratio` most alike to one of the target's are replaced by it (section 3.2, local merging). What is left is
matched with a global set, that of the chunk before, in the same way (`global_ratio`, global merging), and both attend
as one sequence. Each token takes the output of the token that stands for it. As in the authors' code, only at full and
half size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor


def replaced(source: Tensor, target: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Which tokens of Tensor[B, S, C] are left, LongTensor[B, K], and the index of each in [left, target], [B, S]."""
    alike = F.normalize(source.float(), dim=-1) @ F.normalize(target.float(), dim=-1).transpose(1, 2)
    best, match = alike.max(-1)
    order = best.argsort(dim=1, descending=True)
    gone = int(ratio * source.shape[1])
    left = order[:, gone:]
    kept = torch.arange(left.shape[1], device=source.device).expand_as(left)
    return left, (match + left.shape[1]).scatter(1, left, kept)


def rows(tokens: Tensor, index: Tensor) -> Tensor:
    """Tensor[B, N, C] at LongTensor[B, K]: [B, K, C]."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))


class VidToMeProcessor:
    """A diffusers attention processor. frames: of each half of the batch. max_tokens: of a frame at full size."""

    def __init__(
        self, frames: int, max_tokens: int, *, chunk: int = 4, local_ratio: float = 0.9, global_ratio: float = 0.8
    ) -> None:
        self.frames, self.max_tokens, self.chunk = frames, max_tokens, chunk
        self.local_ratio, self.global_ratio = local_ratio, global_ratio
        self.plain = AttnProcessor2_0()

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        tokens = hidden_states.shape[1]
        # At a quarter of the latents' size and below, the joined sequence is short and is attended whole.
        local, globally = (self.local_ratio, self.global_ratio) if 8 * tokens > self.max_tokens else (0.0, 0.0)
        videos = hidden_states.unflatten(0, (-1, self.frames))
        # The same in every layer and run; taken from the device's own numbers it would differ from run to run.
        generator = torch.Generator().manual_seed(0)
        out, known = [], None
        for frames in videos.split(self.chunk, 1):
            count = frames.shape[1]
            target = int(torch.randint(count, (1,), generator=generator))
            order = [target, *(number for number in range(count) if number != target)]
            aimed, others = frames[:, target], frames[:, order[1:]].flatten(1, 2)
            left, index = replaced(others, aimed, local)
            merged = torch.cat([rows(others, left), aimed], 1)
            answer, known = self._with_global(attn, merged, known, globally)
            of_others = rows(answer, index).unflatten(1, (-1, tokens)) if count > 1 else answer[:, :0].unsqueeze(2)
            joined = [answer[:, -tokens:, None].transpose(1, 2), *of_others.split(1, 1)]
            out.append(torch.cat([joined[order.index(number)] for number in range(count)], 1))
        return torch.cat(out, 1).flatten(0, 1)

    def _with_global(self, attn: Any, merged: Tensor, known: Tensor | None, ratio: float) -> tuple[Tensor, Tensor]:
        """Attention's output for a chunk's tokens, and the global set for the next chunk."""
        if known is None:
            return self.plain(attn, merged), merged
        left, index = replaced(merged, known, ratio)
        sequence = torch.cat([rows(merged, left), known], 1)
        return rows(self.plain(attn, sequence), index), rows(sequence, index)
