"""The rounds of local k-means as two Triton kernels: two launches a round, and no matrix of all pairs.

This file is imported where somebody asks for kernel="triton", and nowhere else. It can be imported without Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import AiluRusError
from ..extras import MissingExtraError

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

# Numbers that a program holds of its tokens: 32 for each of 128 threads.
BLOCK = 4096


def _jit(function: Any) -> Any:
    return triton.jit(function) if triton else function


@_jit
def _cell_means(
    x, assigned, around, means, halves, stride, count, tokens, cells, channels,
    STEPS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One cell: the mean of its tokens and half its squared norm, infinite where it has none."""
    image, cell = (tl.program_id(0) // cells).to(tl.int64), tl.program_id(0) % cells
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    total, joined = tl.zeros([WIDTH], tl.float32), tl.zeros([ROWS], tl.float32)
    # All tokens that may have joined are asked, in their order: atomic sums would differ from run to run.
    for step in range(STEPS):
        number = step * ROWS + row
        token = tl.load(around + cell * count + number, mask=number < count, other=-1)
        joins = tl.load(assigned + image * stride + token, mask=token >= 0, other=-1) == cell
        place = x + (image * tokens + token)[:, None] * channels + column[None, :]
        total += tl.sum(tl.load(place, mask=joins[:, None] & (column < channels)[None, :], other=0.0), 0)
        joined += tl.where(joins, 1.0, 0.0)
    size = tl.sum(joined, 0)
    mean = tl.div_rn(total, tl.zeros_like(total) + tl.maximum(size, 1.0))
    tl.store(means + (image * cells + cell) * channels + column, mean, mask=column < channels)
    tl.store(halves + image * cells + cell, tl.where(size > 0, tl.sum(mean * mean, 0) / 2, float("inf")))


@_jit
def _nearest_cells(
    x, candidates, means, halves, assigned, tokens, cells, channels,
    COUNT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A few tokens: the candidate of least |mean|^2 / 2 - token . mean, ties to the first."""
    blocks = tl.cdiv(tokens, ROWS)
    image, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    token, column = block * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    known = token < tokens
    inside = known[:, None] & (column < channels)[None, :]
    features = tl.load(x + (image * tokens + token)[:, None] * channels + column[None, :], mask=inside, other=0.0)
    nearest = tl.load(candidates + token * COUNT, mask=known, other=0)
    least = tl.full([ROWS], float("inf"), tl.float32)
    for number in range(COUNT):
        cell = tl.load(candidates + token * COUNT + number, mask=known, other=0)
        mean = tl.load(means + (image * cells + cell)[:, None] * channels + column[None, :], mask=inside, other=0.0)
        half = tl.load(halves + image * cells + cell, mask=known, other=0.0)
        score = tl.where(half == float("inf"), half, half - tl.sum(features * mean, 1))
        # NaN is the least of all, as it is to argmin.
        nearer = (score < least) | ((score != score) & (least == least))
        least, nearest = tl.where(nearer, score, least), tl.where(nearer, cell, nearest)
    tl.store(assigned + image * tokens + token, nearest, mask=known)


# An operator that torch knows by name: compilers take it as it is, and shapes alone need no Triton.
@torch.library.custom_op("ailurus_hf::local_kmeans_rounds", mutates_args=())
def rounds(features: Tensor, start: Tensor, candidates: Tensor, around: Tensor, num_rounds: int) -> Tensor:
    """The cell that each token joins in rounds of k-means among its candidates.

    Args:
        features: Tensor[B, N, C] (fp32), of mean 0.
        start: LongTensor[N], the cell that each token begins in.
        candidates: LongTensor[N, k], ascending.
        around: LongTensor[M, K], the tokens that each cell is a candidate of, ascending, then -1.
        num_rounds: at least 1.

    Returns:
        LongTensor[B, N].

    Raises:
        AiluRusError: Triton is not installed, or the tensors are on a CPU and it does not interpret.
    """
    if triton is None:
        raise MissingExtraError(
            'kernel="triton" needs triton; kernel="torch" does not: pip install "ailurus-hf[triton]"'
        )
    if features.device.type == "cpu" and isinstance(tl.sum, triton.JITFunction):
        raise AiluRusError(
            'kernel="triton" needs a GPU, got tensors on a CPU: use kernel="torch", or set TRITON_INTERPRET=1 before '
            "Python starts, which is slow and for tests"
        )
    features, (batch, tokens, channels), (cells, count) = features.contiguous(), features.shape, around.shape
    means, halves = features.new_empty(batch, cells, channels), features.new_empty(batch, cells)
    given, found = start.contiguous().expand(batch, -1), start.new_empty(batch, tokens)
    width = max(triton.next_power_of_2(channels), 16)
    rows = max(BLOCK // width, 1)
    sizes, steps = (tokens, cells, channels), triton.cdiv(count, rows)
    at_cells, at_tokens = (batch * cells,), (batch * triton.cdiv(tokens, rows),)
    with torch.accelerator.device_index(features.device.index):
        for _ in range(num_rounds):
            tables = features, given, around, means, halves
            _cell_means[at_cells](*tables, given.stride(0), count, *sizes, steps, rows, width)
            tables = features, candidates, means, halves, found
            _nearest_cells[at_tokens](*tables, *sizes, candidates.shape[1], rows, width)
            given = found
    return found


@rounds.register_fake
def _(features: Tensor, start: Tensor, candidates: Tensor, around: Tensor, num_rounds: int) -> Tensor:
    return start.new_empty(features.shape[:2])
