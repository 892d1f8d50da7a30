"""ControlVideo (arXiv 2305.13077): the pipeline, and what only it uses."""

from .pipeline import ControlVideoPipeline, ControlVideoPipelineOutput

__all__ = ["ControlVideoPipeline", "ControlVideoPipelineOutput"]
