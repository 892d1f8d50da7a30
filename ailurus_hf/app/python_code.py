"""What the page runs, as a program to copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..evaluation.tasks import TaskName

if TYPE_CHECKING:
    from ..evaluation.loading import LoadedModel

RESULT: Mapping[TaskName, str] = {
    "segment": "labels = processor.post_process_semantic_segmentation(outputs, target_sizes=[image.size[::-1]])[0]",
    "classify": "label = model.config.id2label[int(outputs.logits.argmax())]",
    "depth": "depth = processor.post_process_depth_estimation(outputs, target_sizes=[image.size[::-1]])[0]",
    "detect": "boxes = processor.post_process_object_detection(outputs, target_sizes=[image.size[::-1]])[0]",
}


def as_python(loaded: LoadedModel, setting: str, image: str) -> str:
    """The program.

    Args:
        setting: of `Preset.expression`.
        image: the file that it reads.
    """
    ours, theirs = ["AiluRusConfig", "ailurus_status", "apply_ailurus"], []
    classes = [type(loaded.model).__name__, "AutoImageProcessor"]
    if type(loaded.model).__module__.startswith("ailurus_hf."):
        classes[1] = type(loaded.processor).__name__
        ours = [*sorted([ours[0], *classes]), *ours[1:]]
    else:
        theirs = [f"from transformers import {', '.join(sorted(classes))}", ""]
    place = "" if loaded.device.type == "cpu" else f'.to("{loaded.device.type}")'
    run = "outputs = model(**inputs)"
    if getattr(loaded.processor, "window_size", None) is not None:
        theirs = ["from ailurus_hf.segmenter import windowed_outputs"]
        run = 'outputs = windowed_outputs(model, processor, inputs["pixel_values"])'
    imports = f"from ailurus_hf import {', '.join(ours)}"
    if len(imports) > 88:
        imports = "\n".join(["from ailurus_hf import (", *(f"    {each}," for each in ours), ")"])
    lines = [
        "import torch",
        "from PIL import Image",
        *theirs,
        *([] if theirs else [""]),
        imports,
        "",
        f"name = {loaded.name!r}",
        f"model = {classes[0]}.from_pretrained(name, dtype={loaded.dtype}).eval(){place}",
        f"processor = {classes[1]}.from_pretrained(name)",
        f'image = Image.open({image!r}).convert("RGB")',
        f'inputs = processor(images=image, return_tensors="pt"){place}',
        "",
        f"apply_ailurus(model, {setting})",
        "with torch.inference_mode():",
        f"    {run}",
        RESULT[loaded.task],  # type: ignore[index]
        "print(ailurus_status(model))",
    ]
    return "\n".join(lines) + "\n"
