"""Segmenter for transformers. Importing this package registers it with the Auto classes."""

from ..extras import needs_extra
from ..versions import check_versions

check_versions("torch", "transformers")

with needs_extra("vision", "ailurus_hf.segmenter"):
    from transformers import AutoConfig, AutoModelForSemanticSegmentation

    from .configuration_segmenter import SegmenterConfig
    from .convert import convert_segmenter_checkpoint
    from .image_processing_segmenter import (
        AutoImageProcessor,
        SegmenterImageProcessor,
        first_window,
        sliding_window_logits,
        windowed_outputs,
    )
    from .modeling_segmenter import SegmenterForSemanticSegmentation, SegmenterPreTrainedModel

AutoConfig.register("segmenter", SegmenterConfig, exist_ok=True)
AutoModelForSemanticSegmentation.register(SegmenterConfig, SegmenterForSemanticSegmentation, exist_ok=True)
AutoImageProcessor.register(SegmenterConfig, image_processor_classes={"pil": SegmenterImageProcessor}, exist_ok=True)

__all__ = [
    "SegmenterConfig",
    "SegmenterForSemanticSegmentation",
    "SegmenterImageProcessor",
    "SegmenterPreTrainedModel",
    "convert_segmenter_checkpoint",
    "first_window",
    "sliding_window_logits",
    "windowed_outputs",
]
