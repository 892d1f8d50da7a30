"""What every test starts from."""

import logging
import sys

import numpy as np
import pytest
import torch
import torchvision_ops
from PIL import Image

# Before transformers is imported, which imports torchvision where it is there.
torchvision_ops.prepare()

# pytest hears every logger that does not propagate, and torch writes a trace of each compilation where somebody hears.
logging.getLogger("torch.__trace").propagate = True


@pytest.fixture(autouse=True)
def no_compiled_graphs():
    """Graphs of earlier tests count towards the compiler's limit of recompilations, so each test starts without."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(scope="session")
def camvid(tmp_path_factory):
    """A made-up CamVid of a few pictures."""
    folder = tmp_path_factory.mktemp("camvid")
    for split, number in (("train", 4), ("val", 2)):
        for part in ("images", "labels"):
            (folder / split / part).mkdir(parents=True)
        for i in range(number):
            # The color tells the class, so that a window's pixels and labels can be held against each other.
            label = np.kron(np.random.default_rng(i).integers(0, 12, (9, 12)), np.ones((40, 40))).astype(np.uint8)
            Image.fromarray(np.stack([label * 20] * 3, -1)).save(folder / split / "images" / f"{i}.jpg", quality=100)
            Image.fromarray(label).save(folder / split / "labels" / f"{i}.png")
    return folder
