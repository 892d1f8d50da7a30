"""Rows of each image's table: gathered by an index, and multiplied with a few others each.

On a CPU such products are one pass over memory, which gathers no row first: what torch calls a sampled matrix product.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from ..exporting import takes_operators
from ..grid_cache import multiples
from ..precision import without_autocast

# The most that is gathered at once. On a CPU it then stays in the cache (2 to 4 MB were fastest), and the C allocator
# does not return the pages to the system on every call.
CHUNK_BYTES = {"cpu": 2**22}
DEFAULT_CHUNK_BYTES = 2**28


def chunk_length(bytes_each: int, device: torch.device) -> int:
    """How many items of `bytes_each` to gather at once."""
    return max(CHUNK_BYTES.get(device.type, DEFAULT_CHUNK_BYTES) // bytes_each, 1)


def in_parts(one: Tensor, other: Tensor, bytes_each: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Two tensors of one length along dimension 1, in parts of as many as are gathered at once."""
    if torch.compiler.is_compiling():
        # A compiler gathers and sums in one kernel, and stores no row.
        return [(one, other)]
    at_once = chunk_length(bytes_each, one.device)
    return zip(one.split(at_once, 1), other.split(at_once, 1), strict=True)


def image_rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows of each image's table: Tensor[B, n, C] at LongTensor[B, P] to [B, P, C]."""
    batch, count, channels = table.shape
    flat = index + multiples(batch, count, index.device)
    return table.reshape(-1, channels).index_select(0, flat.flatten()).view(batch, -1, channels)


@without_autocast
def row_products(rows: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """The product of each row with those rows of a table that an index names.

    Args:
        rows: Tensor[B, N, C] (fp32).
        table: Tensor[B, n, C] (fp32).
        index: LongTensor[B, N, k], in [0, n).

    Returns:
        Tensor[B, N, k].
    """
    if takes_operators(rows):
        return _in_one_pass(rows, table, index)
    (batch, _, channels), width = rows.shape, index.shape[2]
    products = []
    for some, near in in_parts(rows, index, 2 * rows.element_size() * batch * width * channels):
        there = image_rows(table, near.flatten(1)).view(batch, -1, width, channels)
        products.append((some[:, :, None] * there).sum(-1))
    return torch.cat(products, 1)


def row_norms(rows: Tensor) -> Tensor:
    """Squared norms, Tensor[B, N, C] to [B, N]; rounded as in `row_products`, so that equal rows are 0 apart."""
    if not takes_operators(rows):
        return rows.square().sum(-1)
    itself = torch.arange(rows.shape[1], device=rows.device)[:, None]
    return row_products(rows, rows, itself.expand(rows.shape[0], -1, -1)).squeeze(2)


@torch.library.custom_op("ailurus_hf::row_products", mutates_args=())
def _in_one_pass(rows: Tensor, table: Tensor, index: Tensor) -> Tensor:
    (batch, count, _), width = rows.shape, index.shape[2]
    if table.shape[1] < width:
        # Torch cuts products off where there are more than pairs of the two tables.
        table = torch.nn.functional.pad(table, (0, 0, 0, width - table.shape[1]))
    length = table.shape[1]
    columns = (index + multiples(batch, length, rows.device)[..., None]).flatten()
    _say_beta_once()
    wanted = torch.sparse_csr_tensor(
        multiples(batch * count + 1, width, rows.device).flatten(),
        columns,
        rows.new_zeros(len(columns)),
        (batch * count, batch * length),
        check_invariants=False,
    )
    products = torch.sparse.sampled_addmm(wanted, rows.flatten(0, 1), table.flatten(0, 1).t(), beta=0.0)
    return products.values().view(batch, count, width)


@_in_one_pass.register_fake
def _(rows: Tensor, table: Tensor, index: Tensor) -> Tensor:
    return rows.new_empty(*rows.shape[:2], index.shape[2])


@functools.cache
def _say_beta_once() -> None:
    """Makes the process's first tensor of that layout: torch then says that it is in beta, which helps no user here."""
    nothing = torch.zeros(0, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(nothing.new_zeros(2), nothing, nothing.float(), (1, 1), check_invariants=False)
