"""AiluRusModel…: `from_pretrained` of transformers' Auto classes, with token reduction switched on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    AutoModel,
    AutoModelForDepthEstimation,
    AutoModelForImageClassification,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    PreTrainedModel,
)

from .. import segmenter as _segmenter  # noqa: F401  (registers Segmenter with the Auto classes)
from ..config import AiluRusConfig, from_fields
from ..config_base import read_config
from ..errors import AiluRusError
from .apply import install, saved_config

# A config, its fields, or a file of one.
Settings = AiluRusConfig | dict[str, Any] | str | Path


class _AiluRusAuto:
    """Not a model itself: what it returns is the model that the Auto class returns, with hooks on it."""

    auto_class: Any = None

    def __init__(self) -> None:
        raise TypeError(f"{type(self).__name__} is made by from_pretrained(name_or_path) or from_config(config)")

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        *args: Any,
        ailurus_config: Settings | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Loads a model as the Auto class does and switches AiluRus on.

        Args:
            name_or_path, args, kwargs: as for the Auto class.
            ailurus_config: an AiluRusConfig, its fields, or a file of one, as `autotune(...).save` writes; by default
                the one saved with the model.

        Returns:
            What the Auto class returns, a model with hooks on it.

        Raises:
            AiluRusError: no settings are given, and none were saved.
            UnsupportedModelError: nothing in the model can be reduced.
        """
        loaded = cls.auto_class.from_pretrained(name_or_path, *args, **kwargs)
        model, extra = (loaded[0], loaded[1:]) if isinstance(loaded, tuple) else (loaded, ())
        cls._switch_on(model, ailurus_config, name_or_path)
        return (model, *extra) if extra else model

    @classmethod
    def from_config(cls, config: Any, *, ailurus_config: Settings | None = None, **kwargs: Any) -> PreTrainedModel:
        """A model with new weights, as the Auto class makes it, and AiluRus switched on."""
        model = cls.auto_class.from_config(config, **kwargs)
        cls._switch_on(model, ailurus_config, type(config).__name__)
        return model

    @classmethod
    def _switch_on(cls, model: Any, given: Settings | None, source: str) -> None:
        config = from_fields(AiluRusConfig, given) if isinstance(given, dict) else given
        config = read_config(AiluRusConfig, config) if isinstance(config, str | Path) else config
        config = config or saved_config(model.config)
        if not isinstance(config, AiluRusConfig | None):
            raise AiluRusError(f"ailurus_config must be an AiluRusConfig or its fields, got {type(config).__name__}")
        if config is None:
            raise AiluRusError(
                f"{source} was saved without AiluRus settings: give ailurus_config=AiluRusConfig(keep_ratio=0.5, …)"
            )
        install(model, config)


class AiluRusModel(_AiluRusAuto):
    """AutoModel with AiluRus on.

    Example:
        settings = AiluRusConfig(cluster_location=2, keep_ratio=0.5)
        name = "facebook/dinov2-base"
        model = AiluRusModel.from_pretrained(name, ailurus_config=settings)
        model.save_pretrained("reduced")  # with its settings
        model = AiluRusModel.from_pretrained("reduced")
    """

    auto_class = AutoModel


class AiluRusModelForImageClassification(_AiluRusAuto):
    """AutoModelForImageClassification with AiluRus on.

    Example:
        settings = AiluRusConfig(cluster_location=2, keep_ratio=0.5)
        name = "google/vit-base-patch16-224"
        model = AiluRusModelForImageClassification.from_pretrained(name, ailurus_config=settings)
        model.save_pretrained("reduced")  # with its settings
        model = AiluRusModelForImageClassification.from_pretrained("reduced")
    """

    auto_class = AutoModelForImageClassification


class AiluRusModelForSemanticSegmentation(_AiluRusAuto):
    """AutoModelForSemanticSegmentation with AiluRus on; knows Segmenter as well.

    Example:
        settings = AiluRusConfig(cluster_location=2, keep_ratio=0.5)
        name = "microsoft/beit-base-finetuned-ade-640-640"
        model = AiluRusModelForSemanticSegmentation.from_pretrained(name, ailurus_config=settings)
        model.save_pretrained("reduced")  # with its settings
        model = AiluRusModelForSemanticSegmentation.from_pretrained("reduced")
    """

    auto_class = AutoModelForSemanticSegmentation


class AiluRusModelForObjectDetection(_AiluRusAuto):
    """AutoModelForObjectDetection with AiluRus on.

    Example:
        settings = AiluRusConfig(cluster_location=2, keep_ratio=0.5)
        name = "hustvl/yolos-small"
        model = AiluRusModelForObjectDetection.from_pretrained(name, ailurus_config=settings)
        model.save_pretrained("reduced")  # with its settings
        model = AiluRusModelForObjectDetection.from_pretrained("reduced")
    """

    auto_class = AutoModelForObjectDetection


class AiluRusModelForDepthEstimation(_AiluRusAuto):
    """AutoModelForDepthEstimation with AiluRus on.

    Example:
        settings = AiluRusConfig(cluster_location=2, keep_ratio=0.5)
        name = "depth-anything/Depth-Anything-V2-Small-hf"
        model = AiluRusModelForDepthEstimation.from_pretrained(name, ailurus_config=settings)
        model.save_pretrained("reduced")  # with its settings
        model = AiluRusModelForDepthEstimation.from_pretrained("reduced")
    """

    auto_class = AutoModelForDepthEstimation
