"""Rotary embeddings of representatives: a tensor of angles for each image of the batch."""

from __future__ import annotations

import torch
from torch import Tensor

# cos and sin of each token's angles, Tensor[L, D] or [B, L, D] each.
Rotary = tuple[Tensor, Tensor]


def rotated(tokens: Tensor, rotary: Rotary) -> Tensor:
    """Tensor[B, L, heads, D] rotated as diffusers' apply_rotary_emb does, which knows no batch of angles."""
    cos, sin = (part.unsqueeze(-2).to(tokens.device) for part in rotary)
    real, imaginary = tokens.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], -1).flatten(-2)
    return (tokens.float() * cos + turned.float() * sin).to(tokens.dtype)
