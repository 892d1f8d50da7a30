"""RIFE (Huang et al. 2022, arXiv 2011.06294), in the form HDv3 whose weights ControlVideo takes: a file `flownet.pkl`.

The weights are the user's; names of parameters are those of the file.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import AiluRusError

CHANNELS = 90
# How many times smaller than the frames each block sees them, one block after the other.
SCALES = (4, 2, 1)


class RIFE(nn.Module):
    """The frame half way between two, Tensor[B, 3, H, W] in [0, 1] twice to the same; H and W are multiples of 16.

    The flows from the middle to both sides, and which side a pixel is taken from, are found coarse to fine.
    """

    def __init__(self) -> None:
        super().__init__()
        self.block0, self.block1, self.block2 = (FlowBlock(CHANNELS) for _ in SCALES)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        warped = before, after
        flow, mask = torch.zeros_like(before[:, :1]).repeat(1, 4, 1, 1), torch.zeros_like(before[:, :1])
        for block, scale in zip((self.block0, self.block1, self.block2), SCALES):
            # Both ways round, so that the result does not depend on which frame comes first.
            forth, visible = block(torch.cat([*warped, mask], 1), flow, scale)
            back, hidden = block(torch.cat([*reversed(warped), -mask], 1), swapped(flow), scale)
            flow = flow + (forth + swapped(back)) / 2
            mask = mask + (visible - hidden) / 2
            warped = sampled(before, flow[:, :2]), sampled(after, flow[:, 2:])
        first = mask.sigmoid()
        return warped[0] * first + warped[1] * (1 - first)


class FlowBlock(nn.Module):
    """What is to be added to the flow, Tensor[B, 4, H, W], and to the logit of taking the first side, [B, 1, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv0 = nn.Sequential(
            convolved(7 + 4, channels // 2, stride=2), convolved(channels // 2, channels, stride=2)
        )
        for number in range(4):
            setattr(self, f"convblock{number}", nn.Sequential(convolved(channels), convolved(channels)))
        self.conv1, self.conv2 = enlarged(channels, 4), enlarged(channels, 1)

    def forward(self, pictures: Tensor, flow: Tensor, scale: int) -> tuple[Tensor, Tensor]:
        seen = self.conv0(torch.cat([resized(pictures, 1 / scale), resized(flow, 1 / scale) / scale], 1))
        for number in range(4):
            seen = getattr(self, f"convblock{number}")(seen) + seen
        return resized(self.conv1(seen), scale) * scale, resized(self.conv2(seen), scale)


def convolved(inputs: int, outputs: int | None = None, stride: int = 1) -> nn.Sequential:
    outputs = outputs or inputs
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.PReLU(outputs))


def enlarged(inputs: int, outputs: int) -> nn.Sequential:
    half = inputs // 2
    return nn.Sequential(
        nn.ConvTranspose2d(inputs, half, 4, 2, 1), nn.PReLU(half), nn.ConvTranspose2d(half, outputs, 4, 2, 1)
    )


def resized(maps: Tensor, factor: float) -> Tensor:
    return F.interpolate(maps, scale_factor=factor, mode="bilinear", align_corners=False)


def swapped(flow: Tensor) -> Tensor:
    """The flows to the two sides, the other one first."""
    return torch.cat([flow[:, 2:], flow[:, :2]], 1)


def sampled(picture: Tensor, flow: Tensor) -> Tensor:
    """The picture at each pixel's position plus its flow, Tensor[B, 2, H, W] in pixels (x, y); edges repeat."""
    height, width = picture.shape[-2:]
    y = torch.linspace(-1, 1, height, device=picture.device, dtype=picture.dtype)[:, None].expand(height, width)
    x = torch.linspace(-1, 1, width, device=picture.device, dtype=picture.dtype)[None].expand(height, width)
    moved = torch.stack([x + 2 * flow[:, 0] / (width - 1), y + 2 * flow[:, 1] / (height - 1)], -1)
    return F.grid_sample(picture, moved, mode="bilinear", padding_mode="border", align_corners=True)


def load_rife(path: str | Path) -> RIFE:
    """RIFE with the weights of a file, such as ControlVideo's flownet.pkl. AiluRusError for another network's."""
    network = RIFE()
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        # Saved from DistributedDataParallel; `block_tea` is the teacher, for training alone.
        named = {name.removeprefix("module."): weight for name, weight in weights.items()}
        network.load_state_dict({name: weight for name, weight in named.items() if not name.startswith("block_tea.")})
    except Exception as error:  # whatever unpickling and loading raise
        first, weight = next(iter(network.state_dict().items()))
        raise AiluRusError(
            f"{path} has no weights of RIFE in its form HDv3, among them {first} of {list(weight.shape)}"
        ) from error
    return network.eval().requires_grad_(False)
