"""Condition pictures: canny as OpenCV draws it, and controlnet_aux's detectors called as they want to be."""

import builtins
import sys
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from video_clips import moving_square

from ailurus_hf import AiluRusError
from ailurus_hf.video import CONDITIONS, load_condition
from ailurus_hf.video.conditions import DETECTORS


def test_canny_finds_the_square_where_it_is() -> None:
    frame = moving_square(1)[0]
    edges = load_condition("canny")(frame)
    assert edges.mode == "RGB" and edges.size == frame.size
    drawn = np.asarray(edges.convert("L")) > 0
    rows, columns = np.where(drawn)
    assert {rows.min(), rows.max()} <= {9, 10, 21, 22} and {columns.min(), columns.max()} <= {3, 4, 15, 16}
    assert not drawn[12:20, 6:14].any()
    assert np.array_equal(np.asarray(edges)[..., 0], cv2.Canny(np.asarray(frame), 100, 200))


def test_thresholds_are_those_of_canny() -> None:
    ramp = Image.fromarray(np.repeat(np.repeat([[0, 30]], 8, 1), 8, 0).astype(np.uint8)[..., None].repeat(3, 2))
    assert not np.asarray(load_condition("canny")(ramp)).any()
    assert np.asarray(load_condition("canny", low_threshold=10, high_threshold=20)(ramp)).any()


def test_none_leaves_frames_as_they_are() -> None:
    frame = moving_square(1)[0]
    assert np.array_equal(np.asarray(load_condition("none")(frame)), np.asarray(frame))


class Detector:
    """As those of controlnet_aux 0.0.10: weights by from_pretrained, sides rounded to multiples of 64."""

    calls: list[dict] = []

    @classmethod
    def from_pretrained(cls, pretrained_model_or_path: str, filename: str | None = None) -> "Detector":
        if pretrained_model_or_path == "nowhere":
            raise OSError("no such repository\nmany more lines")
        detector = cls()
        detector.source = pretrained_model_or_path
        return detector

    def to(self, device: str) -> "Detector":
        self.device = device
        return self

    def __call__(self, input_image, detect_resolution=512, image_resolution=512, output_type=None, **options):
        assert isinstance(input_image, Image.Image) and output_type == "pil"
        assert detect_resolution == image_resolution
        self.calls.append({"class": type(self).__name__, "source": self.source, "device": self.device, **options})
        return Image.new("L", (128, 64), 77)


@pytest.fixture
def controlnet_aux(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    module = ModuleType("controlnet_aux")
    for name in ("MidasDetector", "OpenposeDetector", "HEDdetector", "LineartDetector", "NormalBaeDetector"):
        setattr(module, name, type(name, (Detector,), {}))
    monkeypatch.setitem(sys.modules, "controlnet_aux", module)
    monkeypatch.setattr(Detector, "calls", [])
    return Detector.calls


@pytest.mark.parametrize(
    ("name", "detector", "options"),
    [
        ("depth", "MidasDetector", {}),
        ("openpose", "OpenposeDetector", {}),
        ("softedge", "HEDdetector", {}),
        ("lineart", "LineartDetector", {}),
        ("normal", "NormalBaeDetector", {}),
        ("scribble", "HEDdetector", {"scribble": True}),
    ],
)
def test_a_detector_is_loaded_called_and_its_picture_resized(
    controlnet_aux: list[dict], name: str, detector: str, options: dict
) -> None:
    condition = load_condition(name, annotators="my/weights", device="cpu")
    drawn = condition(moving_square(1)[0])
    assert (drawn.mode, drawn.size, np.asarray(drawn).min()) == ("RGB", (48, 32), 77)
    assert controlnet_aux == [{"class": detector, "source": "my/weights", "device": "cpu", **options}]


def test_every_condition_is_tried_above() -> None:
    assert ("canny", *DETECTORS, "none") == CONDITIONS
    assert set(DETECTORS) == {"depth", "openpose", "softedge", "lineart", "normal", "scribble"}


def test_weights_that_are_not_there(controlnet_aux: list[dict]) -> None:
    with pytest.raises(
        AiluRusError, match=r"cannot load controlnet_aux\.MidasDetector from nowhere: no such repository$"
    ):
        load_condition("depth", annotators="nowhere")


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'controlnet_aux'", name="controlnet_aux"),
        ModuleNotFoundError("No module named 'torchvision'", name="torchvision"),
        RuntimeError("operator torchvision::nms does not exist"),
    ],
)
def test_without_controlnet_aux_or_its_torchvision_the_fix_is_named(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A missing library by its extra; a torchvision of another build by the release that fits this torch."""
    plain_import = builtins.__import__

    def broken(name: str, *args: object) -> ModuleType:
        if name == "controlnet_aux":
            raise error
        return plain_import(name, *args)

    monkeypatch.delitem(sys.modules, "controlnet_aux", raising=False)
    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(AiluRusError, match="condition 'depth' \\(unlike 'canny'\\)") as caught:
        load_condition("depth")
    told = str(caught.value)
    if isinstance(error, ModuleNotFoundError):
        assert told.endswith(f'needs {error.name}: pip install "ailurus-hf[video]"')
    else:
        fitting = f'pip install "torchvision==0.{int(torch.__version__.split(".")[1]) + 15}.*"'
        assert str(error) in told and torch.__version__ in told and fitting in told
    load_condition("canny")


def test_another_name_is_refused() -> None:
    with pytest.raises(AiluRusError, match="no condition 'magic': choose one of canny, depth"):
        load_condition("magic")
