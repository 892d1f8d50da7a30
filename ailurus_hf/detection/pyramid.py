"""A plain ViT as the source of a feature pyramid: maps at a quarter, a half, once and twice the patch size.

Either four layers are read, one for each map (BEiT and CAE's recipe for detection, the paper's), or the last layer
alone (ViTDet, Li et al. 2022). The layers are read as hidden states, which AiluRus unmerges where they are read:
compute stays on M tokens.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import AiluRusError
from ..vision.registry import patch_grid

LEVELS = ("0", "1", "2", "3")
_double = partial(nn.ConvTranspose2d, kernel_size=2, stride=2)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of Tensor[B, C, H, W]."""

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features.movedim(1, -1)).movedim(-1, 1)


class ViTPyramid(nn.Module):
    """Four maps from a plain ViT with patches of P: Tensor[B, 3, H, W] to {"0": Tensor[B, C0, 4H/P, 4W/P], …, "3"}.

    Args:
        encoder: a transformers model of flat tokens with CLS or other prefix tokens only (ViTModel, BeitModel,
            DeiTModel, Dinov2Model, …), for any image size: ViT and BEiT resize their position embeddings.
        taps: the layers that are read, by number: four, finest map first, or one for all maps. None: four, at each
            quarter.

    Raises:
        AiluRusError: other taps, or patches that are no power of two, which the heads' strides have to be.

    Example:
        maps = ViTPyramid(encoder)(images)
    """

    def __init__(self, encoder: PreTrainedModel, taps: Sequence[int] | None = None) -> None:
        super().__init__()
        self.encoder, self.config = encoder, encoder.config
        depth, width = self.config.num_hidden_layers, self.config.hidden_size
        self.patch_size = int(self.config.patch_size)
        self.taps = tuple(depth * quarter // 4 for quarter in (1, 2, 3, 4)) if taps is None else tuple(taps)
        if len(self.taps) not in (1, 4) or not all(1 <= tap <= depth for tap in self.taps):
            raise AiluRusError(f"taps must be one or four layers of 1 to {depth}, got {self.taps}")
        if self.patch_size < 4 or self.patch_size & (self.patch_size - 1):
            raise AiluRusError(f"patch_size must be 4, 8, 16 or 32 for maps in steps of two, got {self.patch_size}")
        # A head that reads one layer for all levels narrows its finer maps (ViTDet); with a layer for each they stay
        # wide.
        single = len(self.taps) == 1
        half, quarter = (width // 2, width // 4) if single else (width, width)
        norm = ChannelNorm if single else nn.BatchNorm2d
        self.widths = [quarter, half, width, width]
        self.scales = nn.ModuleList(
            [
                nn.Sequential(_double(width, half), norm(half), nn.GELU(), _double(half, quarter)),
                _double(width, half),
                nn.Identity(),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        )
        resizes = "interpolate_pos_encoding" in inspect.signature(encoder.forward).parameters
        self.arguments: dict[str, Any] = {"interpolate_pos_encoding": True} if resizes else {}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        rows, columns = patch_grid(self.encoder, images)
        states = self.encoder(images, output_hidden_states=True, return_dict=True, **self.arguments).hidden_states
        maps = [self._map(states[tap], rows, columns) for tap in self.taps]
        maps = maps * len(self.scales) if len(maps) == 1 else maps
        return OrderedDict((level, scale(each)) for level, scale, each in zip(LEVELS, self.scales, maps, strict=True))

    def _map(self, hidden_states: Tensor, rows: int, columns: int) -> Tensor:
        patches = hidden_states[:, hidden_states.shape[1] - rows * columns :]
        return patches.transpose(1, 2).unflatten(2, (rows, columns)).contiguous()
