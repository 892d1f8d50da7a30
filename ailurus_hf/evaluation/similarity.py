"""Similarity of reduced features to the plain model's, by layer and by pair of tokens (appendix D, tables 9 to 12)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import AiluRusError

# Rows of a table of token pairs that are made at once.
ROWS = 512


@torch.no_grad()
def reconstruction_similarity(plain: Sequence[Tensor], reduced: Sequence[Tensor], prefix: int = 0) -> list[float]:
    """Mean cosine between each token and its reconstruction, one number a layer (tables 9, 10 and 11).

    Args:
        plain, reduced: the hidden states of both models on the same images, Tensor[B, prefix + N, C] each; those of a
            reduced model are unmerged to all N tokens already (`output_hidden_states=True`). [-1] is the output that
            heads see.
        prefix: tokens before the patches, which are left out.

    Returns:
        A number for each hidden state, at most 1.

    Raises:
        AiluRusError: the two do not match.

    Example:
        >>> states = [torch.randn(1, 1 + 12, 16) for _ in range(3)]
        >>> [round(similarity, 3) for similarity in reconstruction_similarity(states, states, prefix=1)]
        [1.0, 1.0, 1.0]
    """
    if len(plain) != len(reduced):
        raise AiluRusError(f"{len(plain)} hidden states of the plain model but {len(reduced)} of the reduced one")
    means = []
    for before, after in zip(plain, reduced, strict=True):
        if before.shape != after.shape:
            raise AiluRusError(f"hidden states of shapes {tuple(before.shape)} and {tuple(after.shape)} do not match")
        cosine = F.cosine_similarity(before[:, prefix:].float(), after[:, prefix:].float(), dim=-1)
        means.append(cosine.mean().item())
    return means


@dataclass(frozen=True)
class PairPreservation:
    """Of the token pairs whose cosine lies in an interval: their number, and the share that stays in it (table 12).

    Args:
        intervals: `[low, high)`, the last one closed.
        pairs: how many pairs lie in each before.
        kept: how many of them lie in it after, too.

    Example:
        >>> tokens = torch.rand(1, 10, 16)
        >>> sum(pair_preservation(tokens, tokens).pairs)
        45
    """

    intervals: list[tuple[float, float]]
    pairs: list[int]
    kept: list[int]

    @property
    def probability(self) -> list[float | None]:
        return [k / n if n else None for k, n in zip(self.kept, self.pairs, strict=True)]

    def __add__(self, other: PairPreservation) -> PairPreservation:
        """Both sets of images as one."""
        if self.intervals != other.intervals:
            raise AiluRusError("only counts over the same intervals add up")
        pairs = [a + b for a, b in zip(self.pairs, other.pairs, strict=True)]
        kept = [a + b for a, b in zip(self.kept, other.kept, strict=True)]
        return PairPreservation(self.intervals, pairs, kept)


@torch.no_grad()
def pair_preservation(before: Tensor, after: Tensor, num_intervals: int = 10) -> PairPreservation:
    """How many pairs of an image's tokens keep their similarity from one layer to another (table 12).

    Args:
        before, after: patch tokens of the same images at two layers, Tensor[B, N, C]; each pair of different tokens
            counts once.
        num_intervals: they divide 0 to 1 evenly; pairs of negative cosine are in none.

    Returns:
        Numbers of pairs by interval.

    Raises:
        AiluRusError: the shapes do not match.

    Example:
        >>> tokens = torch.rand(1, 10, 16)
        >>> preserved = pair_preservation(tokens, tokens)
        >>> preserved.kept == preserved.pairs
        True
    """
    if before.shape[:2] != after.shape[:2]:
        raise AiluRusError(f"tokens of shapes {tuple(before.shape)} and {tuple(after.shape)} are not the same ones")
    first, second = F.normalize(before.float(), dim=-1), F.normalize(after.float(), dim=-1)
    count = before.shape[1]
    pairs = torch.zeros(num_intervals + 1, dtype=torch.long, device=before.device)
    kept = pairs.clone()
    index = torch.arange(count, device=before.device)
    for start in range(0, count, ROWS):
        rows = slice(start, start + ROWS)
        later = (index > index[rows, None]).expand(before.shape[0], -1, -1)
        old = _interval(first[:, rows] @ first.transpose(1, 2), num_intervals)[later]
        new = _interval(second[:, rows] @ second.transpose(1, 2), num_intervals)[later]
        pairs += old.bincount(minlength=num_intervals + 1)
        kept += old[old == new].bincount(minlength=num_intervals + 1)
    edges = [i / num_intervals for i in range(num_intervals + 1)]
    # The extra slot holds the negative ones.
    return PairPreservation(list(itertools.pairwise(edges)), pairs[:-1].tolist(), kept[:-1].tolist())


def _interval(cosine: Tensor, count: int) -> Tensor:
    """The interval of each cosine, `count` for negative ones. Rounding may leave equal tokens a little past 1."""
    index = (cosine * count).floor().long().clamp(max=count - 1)
    return torch.where(cosine < 0, count, index)
