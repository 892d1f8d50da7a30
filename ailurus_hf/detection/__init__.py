"""Detection and instance segmentation: Mask R-CNN on a plain ViT (AiluRus, section 4.2)."""
