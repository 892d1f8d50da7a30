"""Inner layers of UNets and ControlNets, which with `inner_every` run in every k-th denoising step.

They are all but the first convolution and the last layer of the last up block, which a skip connection joins, and take
most of the time. What comes to that last layer from below changes slowly from step to step (DeepCache, Ma et al. 2024,
arXiv:2312.00858): in the steps between it is kept, or drawn on in a line. Of a ControlNet these steps need what its
first convolution gives; the rest is what it gave before.

This is a cache over steps. Layers that run have their tokens reduced as in any step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import AiluRusError
from ..hooks import Hooks
from .calls import argument_names, with_argument
from .compiled_blocks import eager_in_compiled_blocks
from .forward_state import Forwards
from .kept_layers import KeptLayers


class InnerLayers:
    """Has the inner layers of a network run or not, as the forward's state says.

    Args:
        network: a UNet or a ControlNet of diffusers.
        hooks: of the network's reducer. forwards: where its forwards stand.

    Raises:
        AiluRusError: the network has no such layers.
    """

    def __init__(self, network: nn.Module, hooks: Hooks, forwards: Forwards) -> None:
        self.forwards = forwards
        self.paths, self.last = inner_layers(network)
        # What the skip connection brings stands behind what comes from below.
        self.skip_channels: int = cast(nn.Conv2d, network.get_submodule("conv_in")).out_channels
        for path in self.paths:
            module = network.get_submodule(path)
            hooks.replace_method(module, "forward", partial(self.run_or_give, path))
            # After all others, which may turn the output into what the network goes on with.
            hooks.post_forward(module, partial(self.keep, path))
        if self.last is not None:
            hooks.pre_forward(self.last, self.join)

    def has(self, path: str) -> bool:
        """Whether a module of the network, by path, is in inner layers."""
        return f"{path}.".startswith(tuple(f"{inner}." for inner in self.paths))

    def run_or_give(self, path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What an inner layer gives, or gave."""
        return self.given(path) if self.is_skipping() else forward(*args, **kwargs)

    @eager_in_compiled_blocks
    def is_skipping(self) -> bool:
        """Whether the inner layers do not run in this step."""
        kept = self._kept()
        return kept is not None and kept.skips

    @eager_in_compiled_blocks
    def given(self, path: str) -> Any:
        """What an inner layer gave in the last step in which it ran."""
        kept = self._kept()
        assert kept is not None
        return kept.outputs[path]

    @eager_in_compiled_blocks
    def keep(self, path: str, module: nn.Module, args: tuple, output: Any) -> None:
        """After an inner layer."""
        kept = self._kept()
        if kept is None or kept.skips:
            return
        if path in kept.outputs:
            raise AiluRusError(
                f"{path} ran twice in one forward, on parts of its batch: inner_every cannot tell them apart. Leave it "
                "out, or the splitting"
            )
        kept.outputs[path] = output

    @eager_in_compiled_blocks
    def join(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before the last layer, which gets what comes from below and, behind it, what the skip connection brings."""
        kept = self._kept()
        if kept is None:
            return None
        name = argument_names(module)[0]
        both: Tensor = args[0] if args else kwargs[name]
        if not kept.skips:
            with torch.no_grad():
                kept.keep(both[:, : -self.skip_channels].clone())
            return None
        joined = torch.cat([kept.now(), both[:, -self.skip_channels :]], dim=1)
        return with_argument(args, kwargs, 0, name, joined)

    def _kept(self) -> KeptLayers | None:
        return None if self.forwards.current is None else self.forwards.current.layers


def inner_layers(network: nn.Module) -> tuple[list[str], nn.Module | None]:
    """Paths of the inner layers, outermost alone; and the layer that what they give comes to, None in a ControlNet."""
    parts = {name for name, child in network.named_children() if child is not None}
    if not {"conv_in", "down_blocks"} <= parts:
        raise AiluRusError(
            f"inner_every is of UNets and their ControlNets, and {type(network).__name__} has other layers: leave it "
            "out; full_every with between='nothing' does the like for transformers"
        )
    paths = [f"down_blocks.{n}" for n, _ in enumerate(network.get_submodule("down_blocks").children())]
    paths += ["mid_block"] if "mid_block" in parts else []
    if "up_blocks" not in parts:
        return paths, None
    *inner, last = network.get_submodule("up_blocks").named_children()
    paths += [f"up_blocks.{name}" for name, _ in inner]
    layers = cast(nn.ModuleList, last[1].get_submodule("resnets"))
    for name, child in last[1].named_children():
        # Beside the convolutions, attention and what else there is in each layer.
        if isinstance(child, nn.ModuleList) and len(child) == len(layers):
            paths += [f"up_blocks.{last[0]}.{name}.{n}" for n in range(len(child) - 1)]
    return paths, layers[-1]
