"""SiTo (Zhang et al. 2025, AAAI): self-attention of Stable Diffusion without the tokens that are most like others.

In each cell of 2 x 2 tokens that with the greatest sum of cosines to all tokens, plus a little noise, is a base token.
Of the others those most alike to a base token are left out (`prune`, a share of all tokens), and take afterwards what
self-attention gave for the token left that is most like them. By the authors' code
(github.com/EvelynZhang-epiclab/SiTo), which takes any token that is left, where the paper's figure says a base token;
it prunes in the block's self-attention alone and at full size, as they recommend. The noise is drawn anew in every
block and step. Square grids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from ailurus_hf.hooks import Hooks

from .steps import Steps, replace_forward, rows

CELL, NOISE = 2, 0.1


def base_tokens(scores: Tensor) -> Tensor:
    """The best of each cell of a square grid, Tensor[B, N]: LongTensor[B, cells]. Odd grids lose their last line."""
    side = math.isqrt(scores.shape[1])
    cells = side // CELL
    index = torch.arange(side * side, device=scores.device).view(side, side)[: cells * CELL, : cells * CELL]
    index = index.unflatten(0, (cells, CELL)).unflatten(2, (cells, CELL)).transpose(1, 2).reshape(-1, CELL * CELL)
    best = scores[:, index].argmax(2, keepdim=True)
    return index.expand(len(scores), -1, -1).gather(2, best).squeeze(2)


def pruned(alike: Tensor, base: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which tokens are left, LongTensor[B, K], and which of these each of all tokens takes its output from, [B, N].

    alike: cosines, Tensor[B, N, N]. base: LongTensor[B, bases]. count: of the tokens that go.
    """
    is_base = torch.zeros(alike.shape[:2], dtype=torch.bool, device=alike.device).scatter(1, base, True)
    to_base = alike.gather(2, base[:, None].expand(-1, alike.shape[1], -1)).amax(2)
    gone = to_base.masked_fill(is_base, -math.inf).topk(count, 1).indices
    is_gone = torch.zeros_like(is_base).scatter(1, gone, True)
    left = is_gone.int().argsort(dim=1, stable=True)[:, : alike.shape[1] - count]
    nearest = rows(alike, left).transpose(1, 2).argmax(2)
    own = torch.arange(left.shape[1], device=left.device).expand_as(left)
    source = nearest.scatter(1, left, own)
    return left, source


class SiTo:
    """On one UNet or ControlNet, until `hooks.remove`. sizes: the numbers of tokens that are pruned."""

    def __init__(self, network: nn.Module, prune: float, sizes: Sequence[int]) -> None:
        self.hooks, self.prune, self.sizes = Hooks(), prune, tuple(sizes)
        self.generator = torch.Generator()
        Steps(network, self.hooks, self._begin)
        for block in network.modules():
            if isinstance(block, BasicTransformerBlock):
                self._add(block)

    def _begin(self) -> None:
        # The device's own numbers would differ from run to run.
        self.generator.manual_seed(0)

    def _add(self, block: Any) -> None:
        found: list[tuple[Tensor, Tensor]] = []

        def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
            tokens = args[0] if args else kwargs["hidden_states"]
            found[:] = [self._choose(tokens)] if tokens.shape[1] in self.sizes else []

        def forward(original: Callable[..., Tensor], tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not found:
                return original(tokens, *args, **kwargs)
            left, source = found.pop()
            return rows(original(rows(tokens, left), *args, **kwargs), source)

        self.hooks.pre_forward(block, look)
        replace_forward(self.hooks, block.attn1, forward)

    def _choose(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        unit = F.normalize(tokens.float(), dim=-1)
        alike = unit @ unit.transpose(1, 2)
        noise = torch.randn(tokens.shape[:2], generator=self.generator).to(tokens.device)
        return pruned(alike, base_tokens(alike.sum(2) + NOISE * noise), int(self.prune * tokens.shape[1]))
