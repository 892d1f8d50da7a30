"""ailurus_hf: AiluRus token reduction (arXiv 2311.01197) for Hugging Face models.

Names load when first used, so that `import ailurus_hf` needs torch alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .extras import needs_extra

__version__ = "0.1.0"

_HOME = {
    "AiluRusConfig": "config",
    "AiluRusDiffusionConfig": "config",
    "AiluRusError": "errors",
    "AiluRusModel": "vision.auto",
    "AiluRusModelForDepthEstimation": "vision.auto",
    "AiluRusModelForImageClassification": "vision.auto",
    "AiluRusModelForObjectDetection": "vision.auto",
    "AiluRusModelForSemanticSegmentation": "vision.auto",
    "AiluRusProcessor": "diffusion.processor",
    "Clustering": "clustering",
    "Family": "vision.registry",
    "Level": "config",
    "Reader": "vision.registry",
    "SegmenterConfig": "segmenter",
    "SegmenterForSemanticSegmentation": "segmenter",
    "SegmenterImageProcessor": "segmenter",
    "TokenClusters": "clusters",
    "TokenDecoder": "vision.registry",
    "UnsupportedModelError": "errors",
    "ailurus_enabled": "apply",
    "ailurus_status": "apply",
    "apply_ailurus": "apply",
    "autotune": "evaluation.autotune",
    "count_weighted_attention": "attention",
    "local_kmeans": "clustering",
    "register_clustering": "clustering",
    "register_family": "vision.registry",
    "register_reader": "vision.registry",
    "register_token_decoder": "vision.registry",
    "remove_ailurus": "apply",
    "spatial_density_peaks": "clustering",
}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from .apply import ailurus_enabled, ailurus_status, apply_ailurus, remove_ailurus
    from .attention import count_weighted_attention
    from .clustering import Clustering, local_kmeans, register_clustering, spatial_density_peaks
    from .clusters import TokenClusters
    from .config import AiluRusConfig, AiluRusDiffusionConfig, Level
    from .diffusion.processor import AiluRusProcessor
    from .errors import AiluRusError, UnsupportedModelError
    from .evaluation.autotune import autotune
    from .segmenter import SegmenterConfig, SegmenterForSemanticSegmentation, SegmenterImageProcessor
    from .vision.auto import (
        AiluRusModel,
        AiluRusModelForDepthEstimation,
        AiluRusModelForImageClassification,
        AiluRusModelForObjectDetection,
        AiluRusModelForSemanticSegmentation,
    )
    from .vision.registry import (
        Family,
        Reader,
        TokenDecoder,
        register_family,
        register_reader,
        register_token_decoder,
    )


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needs_extra("diffusion" if _HOME[name].startswith("diffusion") else "vision", name):
        return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
