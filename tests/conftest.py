"""What every test starts from."""

import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def no_compiled_graphs():
    """Graphs of earlier tests count towards the compiler's limit of recompilations, so each test starts without."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
