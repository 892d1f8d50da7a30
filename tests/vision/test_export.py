"""A reduced model leaves Python: torch.export, and ONNX run by onnxruntime, with equal outputs on other images."""

import os
import warnings

import pytest
import torch
from models import images, make_model, predict

from ailurus_hf import apply_ailurus
from ailurus_hf.clustering import neighbors

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
    program = torch.onnx.export(exportable, (images(),), tmp_path / "model.onnx", dynamo=True, verbose=False)
    # Loops over clusters, and the sequences that they fill, are slow, and most runtimes have none.
    assert not {"Loop", "If", "Scan", "SequenceEmpty", "SequenceInsert"} & {
        node.op_type for node in program.model.graph
    }
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


EVERY_CLUSTERING = {**SETTINGS, "k-means, residual": {"clustering": "kmeans", "restore": "residual"}}


@pytest.fixture(params=EVERY_CLUSTERING.values(), ids=EVERY_CLUSTERING)
def classifier(request):
    model = apply_ailurus(make_model(NAMES[0]), cluster_location=1, num_clusters=30, **request.param)
    return Logits(model, NAMES[0]).eval()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_an_exported_program_takes_any_batch(classifier, monkeypatch):
    monkeypatch.setattr(neighbors, "DIRECT_DISTANCE_LIMIT", 0)  # in tiles, as on larger grids
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(classifier, (images(2),), dynamic_shapes=shapes).module()
    for batch in (1, 3):
        x = images(batch, seed=4)
        torch.testing.assert_close(program(x).detach(), predict(classifier.model, NAMES[0], x), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "clustering",
    ["local_kmeans", "density_peaks", *(["ward", "kmeans", "pairs"] if os.environ.get("AILURUS_TEST_EVERY") else [])],
)
def test_onnxruntime_takes_any_batch(clustering, tmp_path):
    model = apply_ailurus(make_model(NAMES[0]), cluster_location=1, num_clusters=30, clustering=clustering)
    classifier = Logits(model, NAMES[0]).eval()
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    path = tmp_path / "model.onnx"
    torch.onnx.export(classifier, (images(2),), path, dynamo=True, verbose=False, dynamic_shapes=shapes)
    session = runtime.InferenceSession(path)
    (given,) = session.get_inputs()
    for batch in (1, 3):
        x = images(batch, seed=4)
        (output,) = session.run(None, {given.name: x.numpy()})
        expected = predict(classifier.model, NAMES[0], x)
        torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-4, atol=1e-4)
    if clustering == "local_kmeans":  # OpenVINO sorts an ONNX file's equal values in any order
        openvino = pytest.importorskip("openvino")
        compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        (output,) = compiled(x.numpy()).values()
        torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-4, atol=1e-4)
