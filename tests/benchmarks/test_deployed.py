"""Benchmarks of exported files, batches and pipelines: tiny models through every runtime that is here."""

import pytest
import torch
from PIL import Image
from transformers.pipelines import image_segmentation

from benchmarks.harness import ROOT
from benchmarks.vision import batched_speed, exported_speed

STREET = ROOT / "examples" / "assets" / "street.jpg"
VIT = "ViT-B/16 512"
SEGMENTER = "Segmenter, shipped, 720 × 960"


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of the exporters' own code
@pytest.mark.parametrize("runtime, name", [("onnxruntime", VIT), ("OpenVINO", SEGMENTER)])
def test_files_give_the_models_outputs(runtime, name):
    pytest.importorskip(runtime.lower())
    pytest.importorskip("onnxscript")
    geometry = exported_speed.TINY[name]
    (row,) = exported_speed.measure(name, geometry, runtime, ["local_kmeans"], repeats=1)
    assert row["difference"] < 1e-4 and row["plain_difference"] < 1e-4
    assert row["export_s"] > 0 and row["megabytes"] > 0 and row["ideal"] > 1
    assert row["share_of_ideal"] == pytest.approx(row["speed_up"] / row["ideal"])


def test_every_geometry_has_a_tiny_one_and_attention_is_not_uniform():
    assert exported_speed.GEOMETRIES.keys() == exported_speed.TINY.keys()
    model = exported_speed.TINY[VIT].make()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with torch.no_grad():
        exported_speed.sharpened(model)
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert len(changed) == 4 and all("q_proj.weight" in name or "k_proj.weight" in name for name in changed)
    depth = exported_speed.TINY["DINOv2-B + DPT head 518"]
    assert depth.prediction(depth.make().eval()(torch.randn(1, 3, *depth.size))).shape == (1, *depth.size)


@pytest.mark.parametrize("name", [VIT, SEGMENTER])
def test_batches_of_different_images(name):
    geometry = exported_speed.TINY[name]
    one = batched_speed.measure_batch(name, geometry, ["local_kmeans"], 1, 1, torch.device("cpu"))[0]
    rows = batched_speed.measure_batch(name, geometry, ["local_kmeans", "ward"], 3, 1, torch.device("cpu"))
    assert [row["clustering"] for row in rows] == ["local_kmeans", "ward"]
    for row in rows:
        # What the FLOPs allow does not depend on the batch.
        assert row["ideal"] == pytest.approx(one["ideal"]) and row["ideal"] > 1 and row["batch"] == 3
        assert row["images_per_s"] / row["plain_images_per_s"] == pytest.approx(row["speed_up"])
        assert -1 <= row["cosine"] <= 1


@pytest.mark.parametrize("name", [VIT, SEGMENTER])
def test_the_steps_of_a_pipeline_are_all_of_its_time(name, tmp_path):
    files = [str(tmp_path / f"{number}.jpg") for number in range(2)]
    for file in files:
        Image.open(STREET).resize((96, 64)).save(file)
    device = torch.device("cpu")
    load_image = image_segmentation.load_image
    plain, reduced = batched_speed.measure_pipeline(name, exported_speed.TINY[name], ["local_kmeans"], files, 1, device)
    assert image_segmentation.load_image is load_image
    assert plain["speed_up"] == 1 and reduced["clustering"] == "local_kmeans"
    for row in (plain, reduced):
        steps = [row[f"{step}_ms"] for step in batched_speed.STEPS]
        assert all(step > 0 for step in steps) and sum(steps) == pytest.approx(row["total_ms"])
