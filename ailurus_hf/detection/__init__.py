"""Detection and instance segmentation: Mask R-CNN, or Faster R-CNN, on a plain ViT (AiluRus, section 4.2)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..extras import needs_extra

with needs_extra("detection", "ailurus_hf.detection"):
    from .pyramid import ViTPyramid

if TYPE_CHECKING:
    from .detector import ViTWithFPN, faster_rcnn, mask_rcnn

__all__ = ["ViTPyramid", "ViTWithFPN", "mask_rcnn", "faster_rcnn"]


def __getattr__(name: str) -> Any:
    # The pyramid alone needs no torchvision.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needs_extra("detection", "ailurus_hf.detection"):
        return getattr(import_module(".detector", __name__), name)
