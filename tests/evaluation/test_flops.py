"""counted_flops: computes nothing, and leaves nothing of its shapes behind."""

import pytest
import torch
from models import CASES, images_for, make_model, run
from torch import nn

from ailurus_hf.evaluation import counted_flops


class Called(nn.Module):
    """A model whose forward takes an image alone."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return run(self.model, pixel_values)


@pytest.mark.parametrize("name", CASES)
def test_a_model_runs_after_its_flops_were_counted_before_its_first_forward(name):
    """Tables of sizes that a model keeps (BEiT's, DINOv3's) would be of shapes alone."""
    case = CASES[name]
    model = Called(make_model(name))
    pixel_values = images_for(name)
    assert counted_flops(model, {"pixel_values": pixel_values}) > 0
    with torch.no_grad():
        assert case.prediction(model(pixel_values)).isfinite().all()
