"""Group norm over all frames of a video, as ControlVideo has it: one mean and variance a group, not one a frame."""

from __future__ import annotations

from torch import Tensor, nn

from ...diffusion.frames import Frames
from ...diffusion.stacks import convolution_norms
from ...hooks import Hooks


class SharedGroupNorm:
    """A context in which a network's ResNet blocks and last norm take statistics over (frames, H, W).

    Hooks stack the frames of a video into one tall image before each norm, and split it after. Other norms stay as they
    are. Reusable, not reentrant.
    """

    def __init__(self, network: nn.Module, frames: Frames) -> None:
        self.norms, self.frames = convolution_norms(network), frames
        self.hooks = Hooks()

    def __enter__(self) -> None:
        for norm in self.norms:
            self.hooks.pre_forward(norm, self.join)
            self.hooks.post_forward(norm, self.split)

    def __exit__(self, *exception: object) -> None:
        self.hooks.remove()

    def join(self, norm: nn.Module, args: tuple[Tensor, ...], kwargs: dict) -> tuple[tuple[Tensor], dict]:
        maps = args[0].unflatten(0, (self.frames.videos(args[0].shape[0]), self.frames.count))
        return (maps.transpose(1, 2).flatten(2, 3),), kwargs

    def split(self, norm: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.unflatten(2, (self.frames.count, -1)).transpose(1, 2).flatten(0, 1)
