"""The measuring itself: turns, medians, FLOPs, controls, and tables that say what the result files say."""

import json
import math
import re

import numpy as np
import pytest
import torch
from model_parts import DECODER, SIZES, segmenter
from models import images, make_model, run
from PIL import Image
from transformers import ViTConfig, ViTModel

from ailurus_hf import AiluRusError, SegmenterImageProcessor, ailurus_status
from ailurus_hf.evaluation.loading import load_model
from benchmarks import harness, methods, report, report_tables
from benchmarks.clustering import cluster_pictures, clustering_cost
from benchmarks.harness import datasets
from benchmarks.peers.controls import grid_pooling, random_centers
from benchmarks.peers.slicing import slice_layers
from benchmarks.training import finetune_speed
from benchmarks.vision import (
    compiled_speed,
    detection_speed,
    families_speed,
    quality,
    segmenter_quality,
    similarity,
    vit_speed,
)


def test_results_say_where_they_come_from(tmp_path):
    about = harness.environment(torch.device("cpu"), "fp32")
    path = harness.save("x", [{"ms": 1.5}], about, tmp_path)
    stored = json.loads(path.read_text())
    assert path == tmp_path / "cpu" / "x-fp32.json" and stored["rows"] == [{"ms": 1.5}]
    assert stored["versions"]["torch"] == torch.__version__ and stored["device"] and stored["command"]


@pytest.mark.parametrize("path", sorted(harness.RESULTS.glob("*/*.json")), ids=lambda path: path.stem)
def test_every_result_file_says_so_and_names_no_folder_of_a_machine(path):
    stored = json.loads(path.read_text())
    assert all(stored[key] for key in ("device", "precision", "versions", "date", "command", "rows"))
    assert not re.search(r"""["' =]/\w""", path.read_text())


@pytest.mark.parametrize("control", [grid_pooling, random_centers])
@pytest.mark.parametrize("grid, num_clusters", [((6, 8), 12), ((23, 30), 100), ((1, 5), 2)])
def test_controls_make_so_many_clusters(control, grid, num_clusters):
    count = math.prod(grid)
    clusters = control(torch.randn(2, count, 8), grid, num_clusters)
    assert clusters.num_clusters == num_clusters
    assert clusters.counts.min() >= 1 and clusters.counts.sum() == 2 * count


def test_speed_and_cost_run_on_small_sizes(monkeypatch):
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    monkeypatch.setitem(vit_speed.GEOMETRIES, "tiny", (128, 16, sizes))
    row, other = vit_speed.measure("tiny", ["density_peaks", "local_kmeans"], repeats=1)
    assert other["ideal"] == row["ideal"] and other["clustering"] == "local_kmeans"
    assert (row["num_tokens"], row["num_clusters"]) == (64, 16)
    assert 1 < row["ideal"] < 4 and row["share_of_ideal"] == pytest.approx(row["speed_up"] / row["ideal"])
    rows = clustering_cost.measure("local_kmeans", [8, 16], 8, repeats=1)
    assert [r["num_tokens"] for r in rows] == [64, 256] and rows[1]["times_previous"] > 0


def test_speed_of_compiled_models(monkeypatch):
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    monkeypatch.setitem(vit_speed.GEOMETRIES, "tiny", (64, 6, sizes))
    monkeypatch.setitem(compiled_speed.GEOMETRIES, "tiny", compiled_speed.of_vit("tiny"))
    rows = compiled_speed.measure("tiny", ["local_kmeans", "pairs"], "bf16", repeats=1, backend="eager")
    assert [row["clustering"] for row in rows] == ["local_kmeans", "pairs"]
    for row in rows:
        assert row["ideal"] > 1 and row["share_of_ideal"] == pytest.approx(row["speed_up"] / row["ideal"])
        assert row["cosine"] < 1 and row["cosine_eager"] == pytest.approx(1) and row["compile_s"] > 0
        assert row["share_of_slicing"] > 0
    model = make_model("ViTForImageClassification")
    twin = compiled_speed.sharing_weights(model)
    assert twin is not model and all(a is b for a, b in zip(twin.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("pad", [True, False])
def test_layers_on_the_first_tokens(pad):
    """The control for speed: each layer gets the class token and the first tokens, whatever the others are."""
    model = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=64)).eval()
    pixels, seen = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), []
    with torch.no_grad():
        plain = model(pixels).last_hidden_state
        hooks = slice_layers(model.layers[1:], {16: 4, 9: 1}, prefix=1, pad=pad)
        for layer in model.layers:
            layer.mlp.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
        sliced = model(pixels).last_hidden_state
        hooks.remove()
        assert torch.equal(model(pixels).last_hidden_state, plain)
    assert seen[:3] == [17, 5, 5] and sliced.shape[1] == (17 if pad else 5)
    assert not torch.allclose(sliced[:, :5], plain[:, :5])


def test_a_dry_run_of_every_kind_of_compiled_model(monkeypatch, capsys):
    names = [name for name in compiled_speed.GEOMETRIES if "ViT-L" not in name]
    monkeypatch.setattr(compiled_speed, "save", lambda *args: pytest.fail("a dry run saves nothing"))
    monkeypatch.setattr("sys.argv", ["compiled_speed", "--tiny", "--clusterings", "kmeans", "--models", *names])
    compiled_speed.main()
    told = capsys.readouterr().out
    assert all(f"| {name} | kmeans |" in told for name in names)


def test_speed_of_models_in_stages_and_with_dense_heads(monkeypatch):
    tiny = families_speed.segformer([1, 1, 2, 1], [16, 16, 32, 32])
    geometry = families_speed.Geometry(tiny, 64, lambda out: out.last_hidden_state, families_speed.STAGE)
    monkeypatch.setitem(families_speed.GEOMETRIES, "tiny", geometry)
    rows = families_speed.measure("tiny", ["local_kmeans"], repeats=1, stages=[(3,), (2, 3)])
    assert [row["reduction"] for row in rows] == ["16 → 4, local_kmeans", "64 → 16, 16 → 4, local_kmeans"]
    assert 1 < rows[0]["ideal"] < rows[1]["ideal"] and rows[0]["cosine"] > rows[1]["cosine"]


def test_training_steps_of_every_kind_of_method(monkeypatch):
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    monkeypatch.setitem(finetune_speed.GEOMETRIES, "tiny", ((128, 128), 150, sizes))
    names = [methods.PAPER, "Expedite", "ToMe"]
    plain, *rows = finetune_speed.measure("tiny", names, [0.25], repeats=1, location=1, batch_size=2, precision="bf16")
    assert [row["method"] for row in rows] == names and plain["share_of_plain"] == 1
    for row in rows:
        assert row["seconds"] > 0 and row["ideal_share"] == pytest.approx(0.65, abs=0.04)
        assert row["tflops"] == pytest.approx(row["ideal_share"] * plain["tflops"])
    assert [row["num_clusters"] for row in rows[:2]] == [16, 16]


@pytest.mark.parametrize("make", [detection_speed.beit, detection_speed.vit, detection_speed.yolos])
@pytest.mark.parametrize("part", ["encoder", "pyramid"])
def test_speed_of_detectors(monkeypatch, make, part):
    monkeypatch.setattr(detection_speed, "SIZE", (96, 128))
    monkeypatch.setitem(detection_speed.MODELS, "tiny", make({**SIZES, "image_size": 96, "patch_size": 16}))
    rows = detection_speed.measure("tiny", [(1, 12), (2, 24)], repeats=1, size=(96, 128), part=part)
    assert [row["reduction"] for row in rows] == ["1, 48 → 12", "2, 48 → 24"]
    assert rows[0]["ideal"] > rows[1]["ideal"] > 1 and -1 <= rows[0]["cosine"] <= 1
    assert rows[0]["share_of_ideal"] == pytest.approx(rows[0]["speed_up"] / rows[0]["ideal"])


def test_quality_of_every_method_on_two_images(tmp_path):
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (tmp_path / "val" / folder).mkdir(parents=True)
    for name in ("one", "two"):
        Image.fromarray(rng.integers(0, 255, (32, 48, 3), dtype=np.uint8)).save(tmp_path / f"val/images/{name}.jpg")
        Image.fromarray(rng.integers(0, 11, (32, 48), dtype=np.uint8)).save(tmp_path / f"val/labels/{name}.png")
    model = segmenter("vit", decoder_config=DECODER, num_labels=11).eval()
    assert SIZES["patch_size"] == 4
    # Those that are turned to their FLOPs are tested by themselves.
    names = [name for name, method in methods.METHODS.items() if not isinstance(method, methods.Matched)]
    left = {"ToMe:r=40": 384 - 4 * 40, "EViT:keep=0.5": 50, "PiToMe:keep=0.9": 253, "StructSAM:keep=0.5": 384}
    names += left
    contenders = {method: (method, 1, 0.25, None) for method in names}
    # Pictures of 32 x 48 pixels that the processor makes 64 x 96, and the labels stay 32 x 48.
    processor = SegmenterImageProcessor(do_resize=True, size={"shortest_edge": 64})
    data = datasets.SegmentationData("camvid", tmp_path)
    read, read_image = [], data.image
    data.image = lambda index: read.append(index) or read_image(index)
    plain, *rows = quality.measure(model, segmenter_quality.segmentation(model, processor, data), contenders, repeats=1)
    assert plain["method"] == "plain" and len(rows) == len(names)
    # To match FLOPs, to time, and once for the labels of all methods together.
    assert sorted(read) == [0, 0, 0, 1, 1, 1]
    for row in rows:
        assert row["num_clusters"] == left.get(row["method"], 96)
        assert 0 <= row["agreement"] <= 1 and row["ideal"] > 1
        assert row["lost"] == pytest.approx(plain["miou"] - row["miou"])


def test_methods_read_their_settings():
    assert methods.parsed("ToMe") == ("ToMe", {})
    assert methods.parsed("ToMe:r=8,restore_at=decoder") == ("ToMe", {"r": 8, "restore_at": "decoder"})
    assert methods.parsed("Expedite:cells=(4, 6),tau=0.1") == ("Expedite", {"cells": (4, 6), "tau": 0.1})
    for wrong in ("ToMee", "ToMe:8", "ToMe:r=", "ToMe:r=f(1)"):
        with pytest.raises(AiluRusError, match="ToMe"):
            methods.parsed(wrong)


@pytest.mark.parametrize("name", ["ToMe", "PiToMe", "EViT", "EViT, fused", "ALGM"])
def test_peers_with_a_knob_are_turned_to_the_flops_of_the_paper(name):
    model, x = make_model("ViTModel"), images(1)
    amount, runs = methods.Amount(1, 0.5), [lambda: run(model, x)]
    goal = methods.flops_with(methods.METHODS[methods.PAPER], model, amount, runs, {})
    full = harness.model_flops(runs[0])
    reduction = methods.apply_method(model, name, amount, runs)
    # As near below as a step of r, or one threshold, allows.
    assert 0.9 * goal < reduction.flops(full, runs[0]) <= goal < 0.75 * full
    reduction.undo()
    given = methods.apply_method(model, "ToMe:r=3", amount, runs)
    runs[0]()
    assert given.num_clusters() == 96 - 4 * 3 and given.settings == {"r": 3, "restore_at": "decoder"}
    given.undo()
    assert not model._forward_pre_hooks


LAYOUTS = {
    "camvid": ("val/images/a.jpg", "val/labels/a.png", None),
    "ade20k": ("images/validation/a.jpg", "annotations/validation/a.png", None),
    "cityscapes": ("leftImg8bit/val/ulm/a_leftImg8bit.png", "gtFine/val/ulm/a_gtFine_labelIds.png", None),
    "pascal_context": ("JPEGImages/a.jpg", "SegmentationClassContext/a.png", "ImageSets/SegmentationContext/val.txt"),
}
# What a label map holds, and the classes that it means.
MEANINGS = {
    "camvid": ([0, 10, 11, 255], [0, 10, 255, 255]),
    "ade20k": ([0, 1, 150, 151], [255, 0, 149, 255]),
    "cityscapes": ([7, 33, 0, 9], [0, 18, 255, 255]),
    "pascal_context": ([0, 59, 60, 255], [0, 59, 255, 255]),
}


@pytest.mark.parametrize("name", datasets.DATASETS)
def test_data_sets_are_found_in_their_layout(name, tmp_path, monkeypatch):
    image, label, listed = LAYOUTS[name]
    held, classes = MEANINGS[name]
    folder = tmp_path / name
    for path in filter(None, (image, label, listed)):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
    with pytest.raises(AiluRusError, match="no val images"):
        datasets.SegmentationData(name, folder)
    Image.new("RGB", (2, 2)).save(folder / image)
    if listed:
        (folder / listed).write_text("a\n")
    with pytest.raises(AiluRusError, match=r"a.*\.png is missing"):
        datasets.SegmentationData(name, folder)
    Image.fromarray(np.array(held, dtype=np.uint8).reshape(2, 2)).save(folder / label)
    monkeypatch.setenv("AILURUS_DATA", str(tmp_path))
    data = datasets.SegmentationData(name)
    assert (
        len(data) == 1 and data.image(0).size == (2, 2) and max(c for c in classes if c < 255) == data.num_classes - 1
    )
    assert data.label(0).tolist() == [classes[:2], classes[2:]]


def test_quality_in_windows_is_that_of_their_average(tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / "val" / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (32, 64, 3), dtype=np.uint8)).save(tmp_path / "val/images/a.jpg")
    Image.fromarray(rng.integers(0, 11, (32, 64), dtype=np.uint8)).save(tmp_path / "val/labels/a.png")
    model = segmenter("vit", decoder_config=DECODER, num_labels=11).eval()
    processor = SegmenterImageProcessor(window_size=32, window_stride=16)
    data = datasets.SegmentationData("camvid", tmp_path)
    contenders = {"ours": (methods.PAPER, 1, 0.25, None)}
    _, row = quality.measure(model, segmenter_quality.segmentation(model, processor, data), contenders, repeats=1)
    assert row["num_clusters"] == 16  # of a window of 8 x 8 patches
    for path in data.pairs[0]:
        Image.open(path).crop((0, 0, 32, 32)).save(path)
    _, whole = quality.measure(
        model, segmenter_quality.segmentation(model, SegmenterImageProcessor(), data), contenders, repeats=0
    )
    assert row["speed_up"] > 0 and "speed_up" not in whole
    assert whole["num_clusters"] == 16 and whole["ideal"] == row["ideal"] > 1


def test_clusters_are_drawn_with_what_is_left_of_the_picture():
    model = segmenter("vit", decoder_config=DECODER, num_labels=11).eval()
    x = images()
    image = Image.fromarray((255 * x[0].permute(1, 2, 0).clamp(0, 1)).byte().numpy())
    settings = {name: {"cluster_location": 1, "num_clusters": 24, "clustering": name} for name in ("ward", "pairs")}
    figure = cluster_pictures.draw(model, x, image, settings)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["ward, 96 to 24", "pairs, 96 to 24", "", ""]
    assigned, rebuilt = (np.asarray(figure.axes[i].images[0].get_array()) for i in (0, 2))
    assert assigned.shape == rebuilt.shape == (*x.shape[-2:], 3) and not np.array_equal(assigned, rebuilt)
    assert not ailurus_status(model).active


def test_tables_in_the_documents_are_what_the_result_files_say():
    for document in report.DOCUMENTS:
        text = (report.ROOT / document).read_text()
        assert report.rewritten(text) == text, f"{document}: run python -m benchmarks.report"


def test_every_table_has_a_place_in_the_documents_and_is_written_there(monkeypatch):
    marks = {name: f"<!-- table: {name} -->" for name in report.TABLES}
    text = "".join((report.ROOT / document).read_text() for document in report.DOCUMENTS)
    assert set(re.findall("<!-- table: .*", text)) == set(marks.values())
    for name, mark in marks.items():
        monkeypatch.setitem(report.TABLES, name, lambda: "a table")
        assert report.rewritten(f"{mark}\n\n<!-- end -->") == f"{mark}\n\na table\n\n<!-- end -->"


def test_pictures_are_shown_by_task_and_beside_tomesd(tmp_path, monkeypatch):
    marked = "<!-- table: pictures from text -->\n\n<!-- end -->"
    monkeypatch.setattr(report_tables, "RESULTS", tmp_path)
    assert report.rewritten(marked) == marked  # nobody measured it
    with pytest.raises(FileNotFoundError):
        report.rewritten(marked.replace("\n\n", "\n\nan old table\n\n"))
    row = {"ssim": 0.9, "facts": 0.8, "gflops": 2.0, "fewer_flops": 2.0, "ms": 5.0, "speed_up": 2.0, "edges": None}
    tomesd = "tomesd 0.5, max_downsample 1"
    of = {"plain": None, tomesd: 20.0, "keys 0.25": 23.0}
    rows = [{"method": name, "psnr": psnr, "psnr_of_all": psnr, **row} for name, psnr in of.items()]
    about = {"device": "a CPU", "precision": "fp32", "versions": {}, "date": "today", "command": "python"}
    about = {**about, "prompts": 12, "seeds": 1, "steps": 20}
    controlled = [{"method": "keys 0.5", "psnr": 30.0, "psnr_of_all": 29.0, **row, "edges": 0.7}]
    (tmp_path / "cpu").mkdir()
    for task, of_task in (("text", rows), ("control", controlled)):
        (tmp_path / f"cpu/diffusion_quality_{task}-fp32.json").write_text(json.dumps({**about, "rows": of_task}))
    speeds = [{"method": name, "size": 512, "speed_up": 1.2} for name in (tomesd, "keys 0.25")]
    (tmp_path / "cpu/diffusion_speed_methods_sd15-bf16.json").write_text(json.dumps({"rows": speeds}))
    text = report.rewritten(marked)
    assert "| keys 0.25 | 23.00 dB | 23.00 dB |" in text and "edges" not in text and "keys 0.5" not in text
    assert (
        f"| {tomesd} | 20.00 dB | 2.00× | keys 0.25 | +3.00 dB | +3.00 dB | 1.20× | keys 0.25 | +3.00 dB | +3.00 dB |"
        in text
    )
    assert (
        "| keys 0.5 |" in (both := report.rewritten(marked.replace("text", "text and edges"))) and "| 0.700 |" in both
    )


def test_similarity_of_every_method_on_two_images(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        Image.fromarray(rng.integers(0, 255, (32, 48, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    model = make_model("Segmenter(ViT, mask transformer)")
    model.save_pretrained(tmp_path / "model")
    SegmenterImageProcessor().save_pretrained(tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"), None, "cpu", "float32", None)
    paths = sorted(tmp_path.glob("*.png"))
    gradual = ["ToMe:r=5", "EViT:keep=0.5", "ALGM:sigmas=0.5", "ACT:interval=9.0"]
    ours = [methods.PAPER, "local k-means, residual"]
    names = [*ours, "Expedite", "CTM", *gradual, "Expedite:cells=(8, 12)"]
    rows, pairs = similarity.measure(loaded, paths, names, [methods.Amount(1, 0.25)], repeats=1)
    assert [row["method"] for row in rows] == names and len(pairs) == 1
    for row in rows[:-1]:
        assert len(row["layers"]) == 5 and row["layers"][0] == pytest.approx(1) and row["last"] < 0.9999
        assert row["ms"]["cluster"] > 0
        assert row["ms"]["unmerge"] > 0  # ACT's too, inside its attention
        assert (row["at_location"] is None) == (row["method"] in gradual)
        assert bool(row["assignment"]) == (row["method"] in ours)
        assert sum(row["sizes"].values()) == (2 * 24 if row["method"] in ours else 0)
    assert rows[-1]["layers"] == pytest.approx([1] * 5)  # as many cells as tokens
    assert 0 < sum(pairs[0]["pairs"]) <= 2 * 96 * 95 // 2
    text = similarity.tables(rows, pairs)
    assert text.count("\n| Expedite | 1 | 0.25 | 24 |") == 2 and "| 0.9-1.0 |" in text
