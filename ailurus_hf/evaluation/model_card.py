"""The model card of a tuned model: how it is loaded, what its setting saves and loses, and where that was measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData
from torch import nn

from .tasks import task_of_class

if TYPE_CHECKING:
    from .tuned import Tuned

LIBRARY = "ailurus_hf"
# What `Tuned.save` writes, beside the model.
RESULT = "tuned.json"
TAGS = ["ailurus", "token-reduction", "arxiv:2311.01197"]
# The Hub's names of tasks, and the class that loads a model for each with its reduction on.
OF_TASK = {
    "segment": ("image-segmentation", "AiluRusModelForSemanticSegmentation"),
    "classify": ("image-classification", "AiluRusModelForImageClassification"),
    "depth": ("depth-estimation", "AiluRusModelForDepthEstimation"),
    "detect": ("object-detection", "AiluRusModelForObjectDetection"),
}


def model_card(tuned: Tuned, target: Any, name: str, base_model: str | None = None) -> str:
    """README.md of a repository that holds a tuned model or pipeline.

    Args:
        tuned: what was measured.
        target: the model or pipeline that is saved.
        name: of the repository or folder, as `from_pretrained` takes it.
        base_model: what was tuned, by its name on the Hub; None: as the target was loaded, unless from a folder.

    Returns:
        Markdown with the Hub's header: `library_name`, `base_model`, `pipeline_tag`, tags.
    """
    base = base_model or _hub_name(target)
    pipeline_tag, code = _loading(target, name)
    data = ModelCardData(library_name=LIBRARY, base_model=base, pipeline_tag=pipeline_tag, tags=TAGS)
    chosen = tuned.rows[tuned.chosen]
    of_base = f" of [{base}](https://huggingface.co/{base})" if base else ""
    sections = [
        f"---\n{data.to_yaml()}\n---\n\n# {name.rsplit('/', 1)[-1]}",
        f"The weights{of_base} as they were, with settings of [AiluRus](https://arxiv.org/abs/2311.01197) token "
        f"reduction: **{chosen.label}**. After an early layer similar tokens become one, and the later layers run on "
        "what is left.",
        f"## Use\n\n```bash\npip install ailurus-hf\n```\n\n```python\n{code}\n```",
        f"## What it saves and loses\n\n**{chosen.speed_up:.2f}× as fast** as without reduction (95 %: "
        f"{chosen.speed_low:.2f} to {chosen.speed_high:.2f}), loss {chosen.loss:.4f} ({chosen.loss_low:.4f} to "
        f"{chosen.loss_high:.4f}), on {chosen.num_inputs} inputs. Loss: {tuned.loss_means}.",
        tuned.table(),
        *([tuned.note] if tuned.note else []),
        "Measured by `ailurus_hf.autotune`, each setting in turns with the plain model: "
        f"{_measured_on(tuned.measured_on)}. Other devices and inputs give other numbers: `{RESULT}` holds these, and "
        "`ailurus-hf tune` finds yours.",
    ]
    return "\n\n".join(sections) + "\n"


def _loading(target: Any, name: str) -> tuple[str | None, str]:
    """The Hub's name of the task, and the code that loads the target with its reduction on and switches it off."""
    if not isinstance(target, nn.Module):
        tag = "text-to-image" if hasattr(target, "tokenizer") else None
        lines = ["from ailurus_hf import apply_ailurus, remove_ailurus", "from diffusers import DiffusionPipeline", ""]
        lines += [f'pipe = DiffusionPipeline.from_pretrained("{name}")', "apply_ailurus(pipe)  # as it was saved"]
        return tag, "\n".join([*lines, "remove_ailurus(pipe)  # all tokens again"])
    kind = type(target).__name__
    tag, loader = OF_TASK.get(task_of_class(kind) or "", (None, "AiluRusModel"))
    ours = [loader, "remove_ailurus"]
    if kind.startswith("Segmenter"):
        ours.append("SegmenterImageProcessor")
        lines = [f'processor = SegmenterImageProcessor.from_pretrained("{name}")']
        theirs = []
    else:
        theirs = ["from transformers import AutoImageProcessor"]
        lines = [f'processor = AutoImageProcessor.from_pretrained("{name}")']
    lines.insert(0, f'model = {loader}.from_pretrained("{name}")  # reduced')
    imports = [f"from ailurus_hf import {', '.join(sorted(ours))}", *theirs, ""]
    return tag, "\n".join([*imports, *lines, "remove_ailurus(model)  # all tokens again"])


def _measured_on(about: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    return f"{about['device']}, {about['threads']} threads, {about['precision']}, {versions}, {about['date']}"


def _hub_name(target: Any) -> str | None:
    """What the target was loaded from, where that is a name on the Hub."""
    name = str(getattr(target, "name_or_path", None) or getattr(target.config, "_name_or_path", "") or "")
    is_hub = name.count("/") == 1 and not name.startswith((".", "/")) and not Path(name).exists()
    return name if is_hub else None
