"""examples/train_classifier.py on a made-up CIFAR-10 of a few pictures, and the benchmark on its model."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from benchmarks import methods
from benchmarks.harness import datasets
from benchmarks.training import trained_models
from benchmarks.vision import classification_quality, quality

pytest.importorskip("accelerate")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import cifar_data  # noqa: E402


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar10")
    for split, number in (("train", 12), ("validation", 6)):
        rng, rows = np.random.default_rng(number), []
        for i in range(number):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(file, "png")
            rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": i % 10})
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}.parquet")
    return folder


def run(*args):
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / "train_classifier.py"), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_train_resume_score_load_and_benchmark(cifar, tmp_path):
    train = ["--data", cifar, "--output", tmp_path, "--width", 64, "--layers", 2, "--batch-size", 4]
    run(*train, "--max-minutes", 1e9, "--epochs", 1)
    run(*train, "--max-minutes", 1e9, "--epochs", 2, "--resume")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [evaluation["step"] for evaluation in metrics["history"]] == [3, 6]
    row = trained_models.gathered("small", tmp_path)
    assert (row["score"], row["score_name"], row["width"]) == (metrics["best"], "accuracy", 64)
    run(*train, "--score")
    score = json.loads((tmp_path / "best" / "metrics.json").read_text())

    model = AutoModelForImageClassification.from_pretrained(tmp_path / "best").eval()
    assert row["parameters"] == model.num_parameters() / 1e6
    processor = AutoImageProcessor.from_pretrained(tmp_path / "best")
    data = datasets.ClassificationData("cifar10", cifar)
    # What a user does with the folder is what was scored: the processor rounds to bytes, training does not.
    seen = processor(images=[data.image(i) for i in range(6)], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(seen, cifar_data.Cifar10(cifar, "validation").batch(range(6)), atol=0.01, rtol=0)

    names = [methods.PAPER, "local k-means, residual", "grid pooling, copy", "Expedite", "ToMe", "EViT:keep=0.5"]
    names.append("pairs, copy:cluster_location=(0,1),keep_ratio=(0.7,0.4)")
    contenders = {name: (name, 1, 0.5, None) for name in names}
    plain, *rows = quality.measure(
        model, classification_quality.classification(model, processor, data, 4), contenders, repeats=1
    )
    assert plain["accuracy"] == round(score["float32_accuracy"], 2)
    assert [row["method"] for row in rows] == names
    for row in rows:
        assert row["lost"] == pytest.approx(plain["accuracy"] - row["accuracy"])
        assert row["images_per_second"] == pytest.approx(4e3 / row["ms"]) and row["ideal"] > 1
        assert row["gflops"] == pytest.approx(plain["gflops"] / row["ideal"])
    assert rows[0]["num_clusters"] == 98
    assert rows[0]["gflops"] == pytest.approx(rows[3]["gflops"], rel=0.25)  # Expedite clusters by products


def test_pictures_are_enlarged_as_pillow_and_torch_do(cifar):
    data = cifar_data.Cifar10(cifar, "train", limit=3)
    expected = torch.nn.functional.interpolate(cifar_data.normalize(data.images), size=224, mode="bilinear")
    torch.testing.assert_close(data.batch(range(3)), expected)
    mirrored = cifar_data.enlarge(cifar_data.normalize(data.images), torch.tensor([[1.0, -1.0]] * 3), torch.zeros(3, 2))
    torch.testing.assert_close(mirrored, expected.flip(-1))


@pytest.mark.parametrize("change", [cifar_data.cutmix, cifar_data.mixup])
def test_shares_are_those_of_the_pixels(change):
    labels = torch.arange(8)
    pixels = labels[:, None, None, None].expand(8, 3, 32, 32).float()
    shares = torch.nn.functional.one_hot(labels, 10).float()
    mixed, mixed_shares = change(pixels, shares, np.random.default_rng(2))
    assert not torch.equal(mixed, pixels)
    torch.testing.assert_close(mixed.mean((1, 2, 3)), mixed_shares @ torch.arange(10.0), atol=1e-4, rtol=1e-4)


def test_folders_of_classes(tmp_path):
    with pytest.raises(datasets.AiluRusError, match="no val images"):
        datasets.ClassificationData("imagenet", tmp_path, "val")
    for name in ("n02", "n01"):
        (tmp_path / "val" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (2, 3)).save(tmp_path / "val" / name / f"{i}.png")
    data = datasets.ClassificationData("imagenet", tmp_path)
    assert data.labels == [0, 0, 1, 1] and data.image(2).size == (2, 3) and data.files[2].parent.name == "n02"
    assert datasets.ClassificationData("imagenet", tmp_path, limit=2).labels == [0, 1]
