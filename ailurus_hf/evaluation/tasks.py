"""What a model is for, told by its own architecture: the class that loads it, and the command that runs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

from .bad_input import BadInputError

TaskName = Literal["segment", "classify", "depth", "detect"]


class Task(NamedTuple):
    """endings: of the architectures for it; auto: the class of transformers that loads one whose architecture is not
    told; noun: what its models do."""

    endings: tuple[str, ...]
    auto: str
    noun: str


TASKS: Mapping[str, Task] = {
    "segment": Task(
        ("ForSemanticSegmentation", "ForUniversalSegmentation"), "AutoModelForSemanticSegmentation", "segments images"
    ),
    "classify": Task(
        ("ForImageClassification", "ForImageClassificationWithTeacher"),
        "AutoModelForImageClassification",
        "classifies images",
    ),
    "depth": Task(("ForDepthEstimation",), "AutoModelForDepthEstimation", "estimates depth"),
    "detect": Task(("ForObjectDetection",), "AutoModelForObjectDetection", "detects objects"),
}
assert tuple(TASKS) == get_args(TaskName)


def architecture_of(config: Any) -> str:
    """The class that the model was saved from; "" where its config does not say."""
    return (getattr(config, "architectures", None) or [""])[0]


def task_of(config: Any) -> str | None:
    """The task that a model's architecture is for; None for an encoder alone, and where the config does not say."""
    return task_of_class(architecture_of(config))


def task_of_class(name: str) -> str | None:
    """The task that a class of models is for, by its name; None for an encoder alone."""
    return next((task for task, about in TASKS.items() if name.endswith(about.endings)), None)


def has_text_tower(config: Any) -> bool:
    """Whether images are compared with texts (CLIP, SigLIP): such a model classifies with classes given as texts."""
    return hasattr(config, "text_config") and hasattr(config, "vision_config") and task_of(config) is None


def model_class(config: Any, name: str, task: str | None) -> Any:
    """The class to load a model with: its own architecture, else the Auto class of the task.

    Args:
        config: the model's.
        name: of the model, for messages.
        task: what it has to be for; None takes any.

    Raises:
        BadInputError: a model of another task, or an encoder alone.
    """
    import transformers

    architecture, own = architecture_of(config), task_of(config)
    if task is None and own is None:
        return transformers.AutoModel
    if task is not None and architecture and own != task:
        runs = f"`ailurus-hf {own}` runs it" if own else "status, visualize and benchmark run it"
        raise BadInputError(
            f"{name} is a {architecture}, which {TASKS[own].noun if own else 'has no head for that'}: {runs}, "
            f"and {TASKS[task].auto} does not load it"
        )
    found = getattr(transformers, architecture, None) if architecture else None
    return found or getattr(transformers, TASKS[task or own or ""].auto)
