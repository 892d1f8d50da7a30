"""A reduced model leaves Python: torch.export, and ONNX run by onnxruntime, with equal outputs on other images."""

import warnings

import pytest
import torch
from models import images, make_model, predict

from ailurus_hf import apply_ailurus

NAMES = ["ViTForImageClassification", "Segmenter(ViT, mask transformer)"]
SETTINGS = {
    "density peaks, copy": {"clustering": "density_peaks", "restore": "copy"},
    "local k-means, smooth": {"clustering": "local_kmeans", "restore": "smooth"},
    "local k-means, residual": {"clustering": "local_kmeans", "restore": "residual"},
    "pairs, residual": {"clustering": "pairs", "restore": "residual"},
    "Ward, smooth": {"clustering": "ward", "restore": "smooth"},
}


class Logits(torch.nn.Module):
    """What exporters take: a tensor in, a tensor out."""

    def __init__(self, model, name):
        super().__init__()
        self.model = model
        self.arguments = {"interpolate_pos_encoding": True} if name.startswith("ViT") else {}

    def forward(self, pixel_values):
        return self.model(pixel_values, **self.arguments).logits


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS)
def exportable(request, name):
    return Logits(apply_ailurus(make_model(name), cluster_location=1, num_clusters=30, **request.param), name).eval()


# The exporters warn of what is deprecated in the exporters.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_an_exported_program_gives_equal_outputs(exportable, name):
    program = torch.export.export(exportable, (images(),)).module()
    for seed in (1, 2):
        expected = predict(exportable.model, name, images(seed=seed))
        torch.testing.assert_close(program(images(seed=seed)).detach(), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_onnxruntime_gives_equal_outputs(exportable, name, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.onnx.export(exportable, (images(),), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (given,) = session.get_inputs()
    for seed in (1, 2):
        expected = predict(exportable.model, name, images(seed=seed))
        (output,) = session.run(None, {given.name: images(seed=seed).numpy()})
        torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-4, atol=1e-4)


def test_exporting_leaves_the_model_as_it_was(exportable, name):
    before = predict(exportable.model, name, images())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.export(exportable, (images(),))
    assert torch.equal(predict(exportable.model, name, images()), before)
