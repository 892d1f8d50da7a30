"""The real controlnet_aux: its canny is ours, and a learned detector is loaded from a folder of weights and draws."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision_ops
from PIL import Image

from ailurus_hf import AiluRusError
from ailurus_hf.video import load_condition

# What it and timm import says that it is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def controlnet_aux():
    with torchvision_ops.in_reach() as found, warnings.catch_warnings():
        if not found:
            pytest.skip("controlnet-aux needs the torchvision of this torch's build, and none is installed")
        warnings.simplefilter("ignore")
        yield pytest.importorskip("controlnet_aux", reason="controlnet-aux is not installed")


@pytest.fixture
def picture() -> Image.Image:
    """Wider than high, and blocks with edges; both sides are multiples of 64, to which detectors round."""
    blocks = np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks.repeat(32, 0).repeat(32, 1))


def test_its_canny_is_ours(controlnet_aux, picture: Image.Image) -> None:
    theirs = controlnet_aux.CannyDetector()(
        picture, low_threshold=100, high_threshold=200, detect_resolution=128, image_resolution=128
    )
    ours = load_condition("canny")(picture)
    assert np.asarray(ours).any() and np.array_equal(np.asarray(theirs.convert("RGB")), np.asarray(ours))


def test_a_learned_detector_loads_its_weights_and_draws(controlnet_aux, picture: Image.Image, tmp_path: Path) -> None:
    from controlnet_aux.lineart import Generator

    torch.manual_seed(0)
    for name in ("sk_model.pth", "sk_model2.pth"):
        torch.save(Generator(3, 1, 3).state_dict(), tmp_path / name)
    drawn = load_condition("lineart", annotators=str(tmp_path), detect_resolution=64)(picture)
    assert (drawn.mode, drawn.size) == ("RGB", picture.size) and np.asarray(drawn).std() > 0
    # The weights are those of the folder: others draw something else.
    torch.save(Generator(3, 1, 3).state_dict(), tmp_path / "sk_model.pth")
    other = load_condition("lineart", annotators=str(tmp_path), detect_resolution=64)(picture)
    assert not np.array_equal(np.asarray(other), np.asarray(drawn))


def test_a_folder_without_the_weights_is_told(tmp_path: Path) -> None:
    with pytest.raises(AiluRusError, match=r"cannot load controlnet_aux\.LineartDetector from .*sk_model\.pth"):
        load_condition("lineart", annotators=str(tmp_path))
