"""What transformer blocks get for each token beside the tokens, made into something for each representative."""

from __future__ import annotations

import math

from torch import Tensor

from ..clusters import TokenClusters
from .calls import with_argument
from .declaration import DiffusionNetwork
from .forward_state import StackState


def of_representatives(
    declared: DiffusionNetwork, names: list[str], running: StackState, args: tuple, kwargs: dict
) -> tuple[tuple, dict]:
    """A block's arguments with something for each representative, where there is something for each token.

    Args:
        names: those of the block's arguments.
    """
    made = dict.fromkeys(declared.by_token, _of_image)
    if declared.modulation is not None and running.call is not None and running.call.timesteps_of_tokens is not None:
        made[declared.modulation] = _means
    # Of most networks, none.
    for name, make in made.items():
        given = {**dict(zip(names, args)), **kwargs}.get(name)
        if given is not None:
            args, kwargs = with_argument(args, kwargs, names.index(name), name, make(running, given))
    return args, kwargs


def _of_image(running: StackState, of_tokens: Tensor) -> Tensor:
    """With what is the same for all tokens of the image once a representative; Tensor[B, L]."""
    assert running.start is not None
    order = running.token_order
    others, image = order.split(of_tokens, math.prod(running.grid))
    return order.join(others, image[:, : running.start.shape[1]])


def _means(running: StackState, of_tokens: Tensor) -> Tensor:
    """The means of each cluster's, Tensor[B, N, ...] to [B, M, ...]; made once, as all blocks get the same."""
    if running.modulation is None or running.modulation[0] is not of_tokens:
        assert isinstance(running.clusters, TokenClusters)
        means = running.clusters.merge(of_tokens.flatten(2)).unflatten(2, of_tokens.shape[2:])
        running.modulation = of_tokens, means
    return running.modulation[1]
