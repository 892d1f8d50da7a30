"""Detection and instance segmentation: Mask R-CNN on a plain ViT (AiluRus, section 4.2)."""

from typing import Any

from ..extras import MissingExtraError, needs_extra

with needs_extra("detection", "ailurus_hf.detection"):
    from .pyramid import ViTPyramid

try:
    with needs_extra("detection", "ailurus_hf.detection"):
        from .mask_rcnn import ViTWithFPN, mask_rcnn
except MissingExtraError as error:
    # The pyramid alone needs no torchvision.
    _missing = error

    def __getattr__(name: str) -> Any:
        if name in __all__:
            raise _missing
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["ViTPyramid", "ViTWithFPN", "mask_rcnn"]
