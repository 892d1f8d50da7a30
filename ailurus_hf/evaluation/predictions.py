"""What each task has to show of one image's predictions, plain and reduced: how equal they are, pictures, numbers.

The command line's --compare and the page of `ailurus-hf app` show the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from ..visualization import Panel
from ..visualization.palettes import ColorMap
from .agreement import relative_error
from .boxes import box_agreement, draw_boxes, find_boxes, names_and_colors
from .comparison import label_map, show_label_maps
from .depth import colorize_depth, depth_difference, depth_map, widen
from .report import Shown
from .tasks import TaskName

if TYPE_CHECKING:
    from .loading import LoadedModel
    from .paired import Pair

# From the model, an image and both outputs: how equal they are, 0 to 1, and what there is to show of them.
Predictions = Callable[["LoadedModel", Image.Image, "Pair"], tuple[float, Shown]]


def segmented(loaded: LoadedModel, image: Image.Image, pair: Pair) -> tuple[float, Shown]:
    """The share of pixels with equal labels; both label maps over the image, and where they differ."""
    plain, reduced = label_map(loaded, pair.plain, image), label_map(loaded, pair.reduced, image)
    return float((plain == reduced).mean()), show_label_maps(image, plain, reduced, None, loaded.class_names())


def classified(loaded: LoadedModel, image: Image.Image, pair: Pair, top: int = 3) -> tuple[float, Shown]:
    """Whether the likeliest class is the same, and the likeliest ones of both."""
    same = pair.plain.logits[0].argmax() == pair.reduced.logits[0].argmax()
    told = [likeliest(loaded, outputs, top) for outputs in (pair.plain, pair.reduced)]
    plain, reduced = (", ".join(f"{name} {score:.1%}" for name, score in scores.items()) for scores in told)
    return float(same), Shown(rows=[("likeliest", plain, reduced)])


def likeliest(loaded: LoadedModel, outputs: Any, top: int) -> dict[str, float]:
    """The likeliest classes with their scores, the best first."""
    names = loaded.class_names()
    best = outputs.logits[0].float().softmax(0).topk(min(top, len(names)))
    return {names[int(i)]: round(float(score), 4) for score, i in zip(*best, strict=True)}


def measured_depth(
    loaded: LoadedModel,
    image: Image.Image,
    pair: Pair,
    colors: ColorMap = "viridis",
    seen: list[float] | None = None,
) -> tuple[float, Shown]:
    """One less the relative error; both depth maps in equal colors, and how far they differ.

    Args:
        seen: of a clip, least and most depth so far; it grows, so that colors do not flicker. None: of this image.
    """
    plain, reduced = depth_map(loaded, pair.plain, image), depth_map(loaded, pair.reduced, image)
    limits = [] if seen is None else seen
    widen(limits, plain)
    sides = [Panel("depth", colorize_depth(depth, limits[0], limits[1], colors)) for depth in (plain, reduced)]
    error = relative_error(torch.from_numpy(plain), torch.from_numpy(reduced))
    return max(0.0, 1 - error), Shown(sides, [depth_difference(plain, reduced)])


def detected(loaded: LoadedModel, image: Image.Image, pair: Pair, threshold: float = 0.5) -> tuple[float, Shown]:
    """How alike the boxes from a score on are, and both drawn."""
    names, palette = names_and_colors(loaded)
    plain, reduced = (find_boxes(loaded, outputs, image).above(threshold) for outputs in (pair.plain, pair.reduced))
    sides = [Panel("boxes", draw_boxes(image, boxes, names, palette)) for boxes in (plain, reduced)]
    counts = ("boxes", str(len(plain.scores)), str(len(reduced.scores)))
    return box_agreement(plain, reduced), Shown(sides, rows=[counts])


OF_TASK: Mapping[TaskName, Predictions] = {
    "segment": segmented,
    "classify": classified,
    "depth": measured_depth,
    "detect": detected,
}
# What the agreement is the share of.
AGREE: Mapping[TaskName, str] = {
    "segment": "of the pixels agree",
    "classify": "the likeliest class agrees",
    "depth": "of the depth agrees",
    "detect": "of the boxes agree",
}


def of_clip(task: TaskName) -> Predictions:
    """What shows the frames of one clip, one after the other."""
    return partial(measured_depth, seen=[]) if task == "depth" else OF_TASK[task]
