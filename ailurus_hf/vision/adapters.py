"""What layers are given beside tokens, made to follow the clusters: relative position bias, rotary embeddings, query
masks.

An adapter sees a layer's arguments by name, may replace some, and returns the attention bias of the reduced layer,
to which the counts have been added already: Tensor[B, 1 or heads, 1 or L, L], where L is prefix + M + suffix.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import AiluRusError, UnsupportedModelError
from .backend import weights_in_place
from .forward_state import ForwardState, Reduction

Adapter = Callable[[dict[str, Any], ForwardState, Reduction, Tensor], Tensor]


# Relative position bias (BEiT, Data2VecVision): a table over displacements, expanded to [heads, 1 + N, 1 + N].


def relative_bias_modules(module: nn.Module) -> list[nn.Module]:
    """The relative position biases in a module; raises UnsupportedModelError where one is not as it is known here."""
    found = [m for m in module.modules() if hasattr(m, "relative_position_bias_table")]
    for bias in found:
        if not {"window_size", "dim_size"} <= set(inspect.signature(bias.forward).parameters):
            raise UnsupportedModelError(
                f"{type(bias).__name__}.forward takes no window_size and dim_size: not known here"
            )
    return found


def relative_bias_of_clusters(module: nn.Module, reduction: Reduction) -> Tensor:
    """Relative position bias between clusters, Tensor[B, heads, 1 + M, 1 + M].

    The bias of two clusters is the table's entry at the displacement of their centroids, which is the mean displacement
    of their tokens. The mean of the entries themselves would need all N² pairs, which is what is to be saved.
    """
    with weights_in_place(module):
        table = _resized_table(module, reduction.grid)
    index = reduction.once("relative index", lambda: _relative_index(reduction))
    batch, length, _ = index.shape
    return table.t().index_select(1, index.flatten()).view(-1, batch, length, length).transpose(0, 1)


def _resized_table(module: nn.Module, grid: tuple[int, ...]) -> Tensor:
    """The table for a grid, Tensor[(2H - 1)(2W - 1) + 3, heads], as the model resizes it (its sides in its order)."""
    table: Any = module.relative_position_bias_table
    old_height, old_width = (2 * side - 1 for side in module.window_size)  # type: ignore[union-attr]
    old = table[:-3].reshape(1, old_width, old_height, -1).permute(0, 3, 1, 2)
    new = F.interpolate(old, size=(2 * grid[0] - 1, 2 * grid[1] - 1), mode="bilinear")
    return torch.cat([new.permute(0, 2, 3, 1).flatten(0, 2), table[-3:]])


def _relative_index(reduction: Reduction) -> Tensor:
    """Rows of the resized table, LongTensor[B, 1 + M, 1 + M]; the last three: class to patch, patch to class, class to
    class."""
    height, width = reduction.grid
    centroids = reduction.centroids()
    displacement = (centroids[:, :, None] - centroids[:, None]).round().long()
    index = (displacement[..., 0] + height - 1) * (2 * width - 1) + displacement[..., 1] + width - 1
    patches = (2 * height - 1) * (2 * width - 1)
    index = F.pad(F.pad(index, (0, 0, 1, 0), value=patches), (1, 0), value=patches + 1)
    index[:, 0, 0] = patches + 2
    return index


def add_relative_bias(
    modules: Sequence[nn.Module], arguments: dict[str, Any], state: ForwardState, reduction: Reduction, bias: Tensor
) -> Tensor:
    """Adds the biases of `modules`; what a model expanded for all N tokens and gave as the mask is dropped."""
    for module in modules:
        bias = bias + relative_bias_of_clusters(module, reduction)
    return bias


# A layer expands its own bias inside its forward. The two hooks make that next to nothing in a reduced layer, which is
# given the clusters' bias by argument. They go by the arguments alone, and so do the same when gradient checkpointing
# runs the layer again.


def shrink_relative_bias(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Pre-hook: one patch instead of the grid, where the sequence is not the grid's."""
    given = _relative_arguments(module, args, kwargs)
    if not _is_reduced(given):
        return None
    window = (1, 1) if given["dim_size"] != 2 else (1, 2)
    return (), {**given, "window_size": window, "interpolate_pos_encoding": False}


def drop_relative_bias(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Any:
    """Forward hook: nothing to add, where the sequence is not the grid's."""
    return 0.0 if _is_reduced(_relative_arguments(module, args, kwargs)) else None


def _relative_arguments(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    return {**dict(zip(("window_size", "interpolate_pos_encoding", "dim_size"), args)), **kwargs}


def _is_reduced(given: dict[str, Any]) -> bool:
    height, width = given["window_size"]
    return given.get("dim_size") is not None and given["dim_size"] != height * width + 1


# Rotary position embeddings (DINOv3): (cos, sin) of angles that are linear in a patch's row and column.


def rotate_at_centroids(arguments: dict[str, Any], state: ForwardState, reduction: Reduction, bias: Tensor) -> Tensor:
    """Gives each representative the rotary embedding of its cluster's centroid."""
    given = arguments.get("position_embeddings")
    if not (isinstance(given, tuple) and len(given) == 2 and given[0].shape == (state.num_tokens, given[0].shape[-1])):
        raise UnsupportedModelError(
            f"position_embeddings are no (cos, sin) of shape ({state.num_tokens}, D) each: this model's are not known "
            "here"
        )
    # A step is 4π over the side's patches at most, and up to four times that by the augmentation of training.
    longest = 16 if state.training else 4
    arguments["position_embeddings"] = reduction.once("rotary", lambda: rotary_at_centroids(given, reduction, longest))
    return bias


def rotary_at_centroids(
    rotary: tuple[Tensor, Tensor], reduction: Reduction, longest_ambiguous: int = 4
) -> tuple[Tensor, Tensor]:
    """(cos, sin) at each cluster's centroid, Tensor[B, 1, M, D] each, from those of the patches, Tensor[N, D].

    The angle at the patch nearest to the centroid, plus the angle of a step down or right times what is left to go. A
    cosine and sine tell a step's angle only where it is under half a turn: along a side of at most `longest_ambiguous`
    patches the nearest patch's angle is taken as it is.
    """
    centroids = reduction.centroids()
    nearest = centroids.round()
    token = (nearest[..., 0] * reduction.grid[1] + nearest[..., 1]).long()
    angle = torch.atan2(rotary[1].float(), rotary[0].float()).unflatten(0, reduction.grid)
    at_nearest = angle.flatten(0, 1)[token]
    for axis, side in enumerate(reduction.grid):
        if side > longest_ambiguous:
            step = angle.select(axis, side // 2) - angle.select(axis, side // 2 - 1)
            step = torch.remainder(step[0] + torch.pi, 2 * torch.pi) - torch.pi
            at_nearest = at_nearest + (centroids - nearest)[..., axis, None] * step
    dtype = rotary[0].dtype
    return at_nearest.cos().to(dtype)[:, None], at_nearest.sin().to(dtype)[:, None]


# Masks of queries (EoMT): which patches each query may look at. A cluster counts for a query with as many of its tokens
# as the query may look at, which is exact where they are equal.


def follow_query_mask(arguments: dict[str, Any], state: ForwardState, reduction: Reduction, bias: Tensor) -> Tensor:
    """Replaces a mask over all N patches by one over clusters."""
    mask = arguments.get("attention_mask")
    if mask is None:
        return bias
    if mask.ndim != 4 or state.suffix:
        raise AiluRusError(f"a mask of shape (B, heads, L, L) was expected, got {tuple(mask.shape)}")
    prefix = mask.shape[-1] - state.num_tokens
    # The same for all heads, and open for all but the queries.
    allowed = (mask[:, 0, :prefix, prefix:] >= 0).transpose(1, 2).float()
    count = reduction.clusters.merge(allowed) * reduction.clusters.counts[..., None]
    # Rounded, because a mean times a count is a whole number but for rounding.
    of_queries = F.pad(count.round().log().transpose(1, 2), (prefix, 0))[:, None]
    of_patches = bias.expand(-1, 1, reduction.clusters.num_clusters, -1)
    return torch.cat([of_queries.to(bias.dtype), of_patches], 2)


# Padding after the patches (SigLIP 2): no token attends to it. The mask that says so covers all N patches.


def mask_padding(arguments: dict[str, Any], state: ForwardState, reduction: Reduction, bias: Tensor) -> Tensor:
    """The bias with padding closed; the mask over all patches is dropped."""
    return F.pad(bias[..., : bias.shape[-1] - state.suffix], (0, state.suffix), value=-torch.inf)
