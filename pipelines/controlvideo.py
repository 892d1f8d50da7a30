"""ControlVideoPipeline for diffusers' `custom_pipeline`; its source is ailurus_hf/pipelines/controlvideo/pipeline.py.

DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipelines/controlvideo.py", trust_remote_code=True)
"""

from ailurus_hf.pipelines import ControlVideoPipeline, ControlVideoPipelineOutput

__all__ = ["ControlVideoPipeline", "ControlVideoPipelineOutput"]
