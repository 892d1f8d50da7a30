"""The cheapest reduction there can be, a control for speed: layers run on the first tokens, whatever they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ailurus_hf.hooks import Hooks


def slice_layers(layers: Iterable[nn.Module], counts: Mapping[int, int], prefix: int = 0, pad: bool = True) -> Hooks:
    """Layers run on the first tokens of theirs: nothing is clustered, merged or weighted.

    counts: from how many tokens to how many; of other numbers all stay. prefix: extra tokens before them, which stay.
    pad: a layer gives back as many as it got, zeros in place of the others; without, later layers get what is left.
    """
    hooks = Hooks()
    lengths: list[int] = []

    def shorten(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        lengths.append(args[0].shape[1])
        tokens = lengths[-1] - prefix
        return (args[0][:, : prefix + counts.get(tokens, tokens)], *args[1:]), kwargs

    def lengthen(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        missing = lengths.pop() - output.shape[1]
        return F.pad(output, (0, 0, 0, missing)) if pad and missing else output

    for layer in layers:
        hooks.pre_forward(layer, shorten)
        # Before those that record hidden states.
        hooks.post_forward(layer, lengthen, prepend=True)
    return hooks
