"""Group norm over all frames of a video, as ControlVideo has it: one mean and variance a group, not one a frame."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from .backend import convolution_norms
from .frames import Frames


@contextmanager
def shared_group_norm(network: nn.Module, frames: Frames) -> Iterator[None]:
    """Takes statistics over (frames, H, W) in a network's ResNet blocks and last norm; others stay as they are.

    Each norm sees the frames of a video above one another in one image; hooks lay them out before and after it.
    """

    def join(norm: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        maps = args[0].unflatten(0, (frames.videos(args[0].shape[0]), frames.count))
        return (maps.transpose(1, 2).flatten(2, 3),)

    def split(norm: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.unflatten(2, (frames.count, -1)).transpose(1, 2).flatten(0, 1)

    with ExitStack() as hooks:
        for norm in convolution_norms(network):
            hooks.callback(norm.register_forward_pre_hook(join).remove)
            hooks.callback(norm.register_forward_hook(split).remove)
        yield
