"""Where the grid of a network's image tokens comes from: the sides of its latents, or the ids of its tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from ..errors import AiluRusError
from .calls import NetworkCall

# Reads the grid of a call: (rows, columns), or (frames, rows, columns). May raise AiluRusError. Where its attribute
# `references` is True, tokens of packed latents after those of the grid are of reference images.
GridReader = Callable[[NetworkCall], tuple[int, ...]]


class LatentGrid:
    """The sides of the latents over the network's patch size.

    Args:
        axes: 2 for pictures, 3 for videos.
        kwargs: the argument of the network that holds "grid", where a caller says which it expects.
        sides: which of the latents' dimensions they are; None: the last ones.
    """

    def __init__(self, axes: int = 2, kwargs: str | None = None, sides: tuple[int, ...] | None = None) -> None:
        self.axes, self.kwargs, self.sides = axes, kwargs, sides or tuple(range(-axes, 0))

    def __call__(self, call: NetworkCall) -> tuple[int, ...]:
        config: Any = cast(Any, call.network).config
        patch = config.patch_size
        if isinstance(patch, Sequence):
            patches = tuple(patch)
        else:
            frames = getattr(config, "patch_size_t", None) or 1
            patches = (frames, patch, patch)[-self.axes :]
        sides = (call.latents.shape[side] for side in self.sides)
        # Plain numbers also where torch.compile would keep sizes symbolic.
        grid = tuple(int(side) // int(size) for side, size in zip(sides, patches, strict=True))
        given = given_grid(call, self.kwargs)
        if given is not None and given != grid:
            form = "(H, W)" if self.axes == 2 else "(T, H, W)"
            raise AiluRusError(f"grid in {self.kwargs} must be {form}, here {grid}, got {given}")
        return grid


class IdGrid:
    """The rows and columns in `img_ids`, Tensor[N, 3 or 4], as Flux and Flux.2 take them; or "grid" in the network's
    attention kwargs.

    Args:
        kwargs: the argument of the network that may hold "grid"; None: it has none.
        references: whether tokens of reference images, which the first of their ids sets apart, may follow.
    """

    def __init__(self, kwargs: str | None = "joint_attention_kwargs", references: bool = False) -> None:
        self.kwargs, self.references = kwargs, references
        # The last ids that were read, held weakly, their version, and their grid.
        self._known: tuple[ReferenceType[Tensor], int, tuple[int, int]] | None = None

    def __reduce__(self) -> tuple:
        return IdGrid, (self.kwargs, self.references)

    def __call__(self, call: NetworkCall) -> tuple[int, ...]:
        num_tokens = call.latents.shape[1]
        given = given_grid(call, self.kwargs)
        if given is not None and len(given) != 2:
            raise AiluRusError(f"grid in {self.kwargs} must be (H, W), got {given}")
        if given is None and torch.compiler.is_compiling():
            instead = "compile it without fullgraph=True"
            if self.kwargs is not None:
                instead = (
                    f'call it with {self.kwargs}={{"grid": (H, W)}}, the rows and columns of tokens (a 16th of the '
                    "picture's sides)"
                )
            raise AiluRusError(f"a compiled network cannot read its grid from img_ids: {instead}")
        ids: Tensor = call.argument("img_ids")
        if given is None and ids.shape[-2] != num_tokens:
            raise AiluRusError(f"{ids.shape[-2]} img_ids are given for {num_tokens} image tokens: give one for each")
        grid = self._read(ids) if given is None else given
        if given is not None and math.prod(grid) != num_tokens:
            beside = f": where there are reference images, leave grid out of {self.kwargs}" if self.references else ""
            raise AiluRusError(
                f"grid {grid} has {math.prod(grid)} tokens, but the network is called with {num_tokens} image tokens"
                f"{beside}"
            )
        return grid

    def _read(self, ids: Tensor) -> tuple[int, int]:
        """Reads the grid, which waits for the device: once for a tensor, of which pipelines make one a picture."""
        version = 0 if ids.is_inference() else ids._version
        known = self._known
        if known is None or known[0]() is not ids or known[1] != version:
            self._known = known = ref(ids), version, grid_from_ids(_unbatched(ids), self.references)
        return known[2]


def given_grid(call: NetworkCall, kwargs: str | None) -> tuple[int, ...] | None:
    """The grid that the caller gives in the network's attention kwargs."""
    given = None if kwargs is None else (call.argument(kwargs) or {}).get("grid")
    return None if given is None else tuple(int(side) for side in given)


def unbatched_ids(call: NetworkCall, name: str) -> Tensor:
    """Ids of tokens, Tensor[L, 3]; older versions of diffusers gave them a batch."""
    return _unbatched(call.argument(name))


def _unbatched(ids: Tensor) -> Tensor:
    return ids[0] if ids.ndim == 3 else ids


def grid_from_ids(ids: Tensor, references: bool = False) -> tuple[int, int]:
    """(H, W) of the row and column of each image token, Tensor[N, 3 or 4]; AiluRusError unless they are one grid.

    Args:
        references: whether ids of reference images may follow, whose first number is another one.
    """
    positions = ids.detach().cpu()
    of_image = positions[:, 0] == positions[0, 0]
    count = int(of_image.sum())
    if of_image[:count].all() and (references or count == len(positions)):
        image = positions[:count]
        width = int((image[:, 1] == image[0, 1]).sum())
        rows = image[: count // width * width].unflatten(0, (-1, width))
        in_rows = (rows[:, :, 1] == rows[:, :1, 1]).all() and (rows[:, :, 2] == rows[:1, :, 2]).all()
        if count % width == 0 and in_rows:
            return count // width, width
    beside = "" if references else ", and reference images beside it cannot be in this network"
    raise AiluRusError(f"the {len(positions)} img_ids are not the rows and columns of one image{beside}")
