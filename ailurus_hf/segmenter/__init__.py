"""Segmenter for transformers. Importing this package registers it with the Auto classes."""

from transformers import AutoConfig, AutoModelForSemanticSegmentation

from .configuration_segmenter import SegmenterConfig
from .modeling_segmenter import SegmenterForSemanticSegmentation, SegmenterPreTrainedModel

AutoConfig.register("segmenter", SegmenterConfig, exist_ok=True)
AutoModelForSemanticSegmentation.register(SegmenterConfig, SegmenterForSemanticSegmentation, exist_ok=True)

__all__ = [
    "SegmenterConfig",
    "SegmenterForSemanticSegmentation",
    "SegmenterPreTrainedModel",
]
