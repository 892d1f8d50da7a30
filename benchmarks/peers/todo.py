"""ToDo (Smith et al. 2024, arXiv 2402.13573): self-attention whose keys and values are a coarser grid of the tokens.

Queries stay whole. Keys and values are every `factor`-th row and column, by nearest neighbor, as in the paper's
section 3.2; at half the latents' resolution the factor is halved, below that nothing is reduced.
"""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor


class ToDoProcessor:
    """A diffusers attention processor for square latents. latent_tokens: of the full grid. factor: per side."""

    def __init__(self, latent_tokens: int, factor: int = 2) -> None:
        self.latent_tokens, self.factor = latent_tokens, factor
        self.plain = AttnProcessor2_0()

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        if encoder_hidden_states is None:
            batch, tokens, channels = hidden_states.shape
            factor = self.factor // math.isqrt(self.latent_tokens // tokens)
            if factor > 1:
                side = math.isqrt(tokens)
                grid = hidden_states.transpose(1, 2).reshape(batch, channels, side, side)
                coarse = F.interpolate(grid, size=side // factor, mode="nearest-exact")
                encoder_hidden_states = coarse.flatten(2).transpose(1, 2)
        out: Tensor = self.plain(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return out
