"""torchvision's Mask R-CNN and Faster R-CNN on a plain ViT of transformers, which `apply_ailurus` reduces as any model.

encoder = BeitModel.from_pretrained("microsoft/beit-base-patch16-224", add_pooling_layer=False)
detector = mask_rcnn(encoder, num_classes=91)
apply_ailurus(detector, cluster_location=3, num_clusters=1296)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..extras import needs_extra
from .pyramid import ChannelNorm, ViTPyramid

with needs_extra("detection", "Mask R-CNN"):
    from torchvision.models.detection import FasterRCNN, MaskRCNN
    from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

OUT_CHANNELS = 256
Kind = TypeVar("Kind", MaskRCNN, FasterRCNN)


class ViTWithFPN(nn.Module):
    """What torchvision's detectors take as a backbone: images to maps of `out_channels` channels, five of them.

    Maps from four layers are joined from the coarsest to the finest (FPN, Lin et al. 2017); those from one layer hold
    the same already and are only brought to one width (ViTDet, Li et al. 2022, section 3).

    Args:
        pyramid: makes four maps of images.
        out_channels: of every map.

    Example:
        backbone = ViTWithFPN(ViTPyramid(encoder))
    """

    def __init__(self, pyramid: ViTPyramid, out_channels: int = OUT_CHANNELS) -> None:
        super().__init__()
        self.pyramid, self.out_channels = pyramid, out_channels
        self.fpn: nn.Module
        if len(pyramid.taps) == 4:
            self.fpn = FeaturePyramidNetwork(pyramid.widths, out_channels, LastLevelMaxPool())
        else:
            self.fpn = SameWidth(pyramid.widths, out_channels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = self.fpn(self.pyramid(images))
        return maps


class SameWidth(nn.Module):
    """Each map by itself to `out_channels` channels, and one more map of half the coarsest's size."""

    def __init__(self, widths: Sequence[int], out_channels: int) -> None:
        super().__init__()
        conv = partial(Conv2dNormActivation, norm_layer=ChannelNorm, activation_layer=None)
        self.levels = nn.ModuleList(
            nn.Sequential(conv(width, out_channels, 1), conv(out_channels, out_channels, 3)) for width in widths
        )
        self.coarser = LastLevelMaxPool()

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        results = [level(each) for level, each in zip(self.levels, maps.values(), strict=True)]
        results, names = self.coarser(results, list(maps.values()), list(maps))
        return OrderedDict(zip(names, results, strict=True))


def mask_rcnn(
    encoder: PreTrainedModel,
    num_classes: int,
    taps: Sequence[int] | None = None,
    out_channels: int = OUT_CHANNELS,
    **fields: Any,
) -> MaskRCNN:
    """Mask R-CNN on a ViT or BEiT, for images of any size, padded to whole patches (AiluRus, section 4.2).

    Args:
        encoder: as in `ViTPyramid`.
        num_classes: with the background, which is class 0 (91 for COCO's category numbers).
        taps: as in `ViTPyramid`; four, at each quarter of the depth, by default. `taps=(depth,)` reads the last alone.
        out_channels: of the maps that the heads see; fewer make a lighter detector.
        fields: of torchvision's MaskRCNN (min_size=800 and max_size=1333 pixels, image_mean, image_std, …).

    Returns:
        torchvision's MaskRCNN.

    Example:
        encoder = BeitModel.from_pretrained("microsoft/beit-base-patch16-224", add_pooling_layer=False)
        detector = apply_ailurus(mask_rcnn(encoder, num_classes=91), cluster_location=3, num_clusters=1296)
    """
    return _on_pyramid(MaskRCNN, encoder, num_classes, taps, out_channels, fields)


def faster_rcnn(
    encoder: PreTrainedModel,
    num_classes: int,
    taps: Sequence[int] | None = None,
    out_channels: int = OUT_CHANNELS,
    **fields: Any,
) -> FasterRCNN:
    """The same without masks: boxes alone, for data that has no others.

    Args:
        encoder, num_classes, taps, out_channels: as in `mask_rcnn`.
        fields: of torchvision's FasterRCNN.

    Returns:
        torchvision's FasterRCNN.

    Example:
        encoder = ViTModel.from_pretrained("google/vit-base-patch16-224", add_pooling_layer=False)
        detector = apply_ailurus(faster_rcnn(encoder, num_classes=4), cluster_location=3, keep_ratio=0.4)
    """
    return _on_pyramid(FasterRCNN, encoder, num_classes, taps, out_channels, fields)


def _on_pyramid(
    kind: type[Kind],
    encoder: PreTrainedModel,
    num_classes: int,
    taps: Sequence[int] | None,
    out_channels: int,
    fields: dict[str, Any],
) -> Kind:
    backbone = ViTWithFPN(ViTPyramid(encoder, taps), out_channels)
    return kind(backbone, num_classes, **{"size_divisible": backbone.pyramid.patch_size, **fields})
