"""Detection and instance segmentation: Mask R-CNN on a plain ViT (AiluRus, section 4.2)."""

from ..extras import needs_extra

with needs_extra("detection", "ailurus_hf.detection"):
    from .mask_rcnn import ViTWithFPN, mask_rcnn
    from .pyramid import ViTPyramid

__all__ = ["ViTPyramid", "ViTWithFPN", "mask_rcnn"]
