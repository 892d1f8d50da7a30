"""A page in the browser: one image or clip through a model, plain beside reduced, with the settings at hand.

`Workbench` computes and needs no gradio; `page` shows what it gives; `launch` serves the page, as `ailurus-hf app`
does, and on Hugging Face Spaces (examples/space).
"""

from .serving import launch, open_workbench
from .workbench import ComparedClip, ComparedPhoto, Workbench

__all__ = ["ComparedClip", "ComparedPhoto", "Workbench", "launch", "open_workbench"]
