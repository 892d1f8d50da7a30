"""Condition pictures for a ControlNet, drawn from a clip's frames: canny here, the others by controlnet_aux.

Canny needs no weights. The detectors of controlnet_aux load theirs by their own `from_pretrained`, and need a
torchvision built for the torch that is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ..errors import AiluRusError
from ..extras import needs_extra, require
from ..images import to_rgb

Condition = Callable[[Image.Image], Image.Image]

ANNOTATORS = "lllyasviel/Annotators"


class Detector(NamedTuple):
    """A detector class of controlnet_aux, and what its call is given besides the picture."""

    name: str
    options: dict[str, Any] = {}


# As ControlVideo maps them (its inference.py).
DETECTORS = {
    "depth": Detector("MidasDetector"),
    "openpose": Detector("OpenposeDetector"),
    "softedge": Detector("HEDdetector"),
    "lineart": Detector("LineartDetector"),
    "normal": Detector("NormalBaeDetector"),
    "scribble": Detector("HEDdetector", {"scribble": True}),
}
CONDITIONS = ("canny", *DETECTORS, "none")


def load_condition(
    name: str = "canny",
    *,
    annotators: str = ANNOTATORS,
    device: str | torch.device = "cpu",
    low_threshold: int = 100,
    high_threshold: int = 200,
    detect_resolution: int = 512,
) -> Condition:
    """A function from an RGB picture to its condition picture, RGB and of the same size.

    Args:
        name: "canny"; "depth", "openpose", "softedge", "lineart", "normal" or "scribble"; "none" leaves frames as they
            are, for a clip that already shows conditions.
        annotators: folder or Hub name with the detectors' weights.
        device: where detectors run.
        low_threshold, high_threshold: of canny's gradients, as in OpenCV.
        detect_resolution: shorter side that a detector sees, in pixels.

    Returns:
        The function.

    Raises:
        AiluRusError: another name, or a detector or its weights that cannot be loaded.

    Example:
        draw_edges = load_condition("canny")
        edges = [draw_edges(frame) for frame in open_clip("walk.mp4")]
    """
    if name == "none":
        return to_rgb
    if name == "canny":
        cv2 = require("cv2", "video")

        def canny(picture: Image.Image) -> Image.Image:
            edges = cv2.Canny(np.asarray(to_rgb(picture)), low_threshold, high_threshold)
            return Image.fromarray(edges).convert("RGB")

        return canny
    if name not in DETECTORS:
        raise AiluRusError(f"no condition {name!r}: choose one of {', '.join(CONDITIONS)}")
    kind = DETECTORS[name]
    detector = _load(name, kind.name, annotators).to(device)

    def detect(picture: Image.Image) -> Image.Image:
        sides = {"detect_resolution": detect_resolution, "image_resolution": detect_resolution}
        drawn = detector(to_rgb(picture), output_type="pil", **sides, **kind.options)
        # Detectors round sides to multiples of 64.
        return drawn.convert("RGB").resize(picture.size, Image.Resampling.BILINEAR)

    return detect


def _load(name: str, detector: str, annotators: str) -> Any:
    with needs_extra("video", f"condition {name!r} (unlike 'canny')"):
        import controlnet_aux
    try:
        return getattr(controlnet_aux, detector).from_pretrained(annotators)
    except Exception as error:  # the Hub, the file, the weights: as many classes as libraries
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise AiluRusError(f"cannot load controlnet_aux.{detector} from {annotators}: {reason}") from error
