"""What every test starts from."""

import sys

import pytest
import torch
import torchvision_ops

# Before transformers is imported, which imports torchvision where it is there.
torchvision_ops.prepare()


@pytest.fixture(autouse=True)
def no_compiled_graphs():
    """Graphs of earlier tests count towards the compiler's limit of recompilations, so each test starts without."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
