"""The training scripts of examples/ on a made-up CamVid of a few pictures: train, go on, export, load."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from ailurus_hf.segmenter import SegmenterForSemanticSegmentation

pytest.importorskip("accelerate")
EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import pretrain_masked  # noqa: E402
from camvid_data import (  # noqa: E402
    UNLABELED,
    CamVid,
    confusion_on_images,
    scores,
    training_batch,
    window_positions,
)
from export_segmenter import averaged  # noqa: E402
from pretrain_masked import MaskedPretraining, Reduction, order_by_cells, small_segmenter  # noqa: E402
from train_segmenter import set_position_grid  # noqa: E402
from widen_segmenter import widened  # noqa: E402

from benchmarks.training import pretrain_quality, pretrain_speed  # noqa: E402


def run(script, *args):
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_pretrain_train_resume_export_load(camvid, tmp_path):
    small = ["--width", 64, "--layers", 1, "--decoder-layers", 1]
    start, output = tmp_path / "pretrained", tmp_path / "run"
    run("pretrain_masked.py", "--data", camvid, "--output", start, "--minutes", 0.02, "--batch-size", 2, *small)
    train = ["--data", camvid, "--output", output, "--batch-size", 2, "--max-minutes", 1e9]
    run("train_segmenter.py", *train, "--init", start, "--epochs", 1)
    run("train_segmenter.py", *train, "--resume", *small, "--epochs", 2)
    metrics = json.loads((output / "metrics.json").read_text())
    assert [evaluation["step"] for evaluation in metrics["history"]] == [2, 4]
    assert metrics["best"] == max(evaluation["miou"] for evaluation in metrics["history"])

    run("export_segmenter.py", "--data", camvid, "--model", output / "best", "--output", tmp_path / "out")
    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "out").eval()
    assert model.dtype == torch.float32 and model.config.id2label[3] == "road"
    weights = sum(p.numel() for p in model.parameters())
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 2 * weights + 50_000  # half precision on disk
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").label_pad_value == UNLABELED
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    val = CamVid(camvid, "val")
    assert result["miou"] == scores(confusion_on_images(model, val, range(2)))["miou"]
    card, names = (tmp_path / "out" / "README.md").read_text(), {}
    assert f"{result['miou']:.1f}" in card
    exec(re.search(r"```python\n(.*?)```", card, re.S)[1], names)
    assert names["model"].num_parameters() == weights and names["processor"].label_pad_value == UNLABELED


def test_a_second_stage_sees_the_images_enlarged(camvid, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    train = ["--data", camvid, "--batch-size", 1, "--max-minutes", 1e9, "--epochs", 0.5]
    small = ["--width", 64, "--layers", 1, "--decoder-layers", 1]
    run("train_segmenter.py", *train, "--output", first, *small)
    enlarged = ["--enlarge", 2, "--grid", 24, 32, "--min-batch-size", 1]
    run("train_segmenter.py", *train, "--output", second, "--init", first / "best", *enlarged)
    mean = ["--average-with", first / "best", "--output", tmp_path / "out"]
    run("export_segmenter.py", "--data", camvid, "--model", second / "best", *mean)

    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "out").eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert tuple(model.config.encoder_config.image_size) == (720, 960)
    stages = [AutoModelForSemanticSegmentation.from_pretrained(run / "best").state_dict() for run in (first, second)]
    name = "encoder.layers.0.mlp.fc1.weight"
    mean = (stages[0][name] + stages[1][name]) / 2
    torch.testing.assert_close(model.state_dict()[name], mean, atol=1e-4, rtol=1e-3)
    # What a user does with the folder is what was scored.
    data = CamVid(camvid, "val", enlarge=2)
    inputs = processor(images=data.images[0], return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"], data.image(0)[None])
    with torch.no_grad():
        predicted = processor.post_process_semantic_segmentation(model(**inputs), target_sizes=[(360, 480)])[0]
    confusion = torch.zeros(12, 11, dtype=torch.long)
    confusion.index_put_((data.label(0).flatten(), predicted.flatten()), torch.tensor(1), accumulate=True)
    assert torch.equal(confusion[:11], confusion_on_images(model, data, [0]))


def test_the_mean_of_several_runs_is_of_all_their_weights():
    models = [small_segmenter((4, 6), 64, 1, 1) for _ in range(3)]
    set_position_grid(models[2], (2, 3))
    given = [{name: weight.clone() for name, weight in model.named_parameters()} for model in models]
    mean = averaged(models[0], models[1:])
    for name, weight in mean.named_parameters():
        if "position" not in name:
            torch.testing.assert_close(weight, sum(each[name] for each in given) / 3)
    assert mean.config.encoder_config.image_size == [64, 96]
    assert all(torch.equal(weight, given[0][name]) for name, weight in models[0].named_parameters())


@pytest.mark.parametrize("scale", [0.7, 1.0, 1.7])
@pytest.mark.parametrize("enlarge, grid", [(1, (12, 16)), (1, (23, 30)), (2, (12, 16)), (2, (45, 60))])
def test_pixels_and_labels_of_a_window_move_together(camvid, scale, enlarge, grid):
    data, rng = CamVid(camvid, "train", enlarge), np.random.default_rng(0)
    images, labels, corners = training_batch(data, [0, 1, 2, 3], grid, (scale, scale), 0.0, rng)
    assert images.shape == (4, 3, grid[0] * 16, grid[1] * 16) and labels.shape == images[:, 0].shape
    assert (corners >= 0).all() and (corners + torch.tensor(grid) <= torch.tensor(data.grid)).all()
    for image, label in zip(images, labels, strict=True):
        # Brightness grows with the class id whatever the color jitter: its order must survive.
        seen = [i for i in range(11) if (label == i).sum() > 400]
        brightness = [image.mean(0)[label == i].median().item() for i in seen]
        assert len(seen) > 2 and np.corrcoef(seen, brightness)[0, 1] > 0.9


def test_window_positions_are_the_rows_under_the_window():
    table = torch.arange(1 + 23 * 30).float()[None, :, None]
    rows = window_positions(table, torch.tensor([[0, 0], [11, 14]]), (12, 16), whole=(23, 30))[..., 0]
    assert rows.shape == (2, 1 + 12 * 16)
    assert rows[0, :3].tolist() == [0, 1, 2] and rows[0, 17] == 1 + 30
    assert rows[1, 0] == 0 and rows[1, 1] == 1 + 11 * 30 + 14 and rows[1, -1] == 23 * 30


def test_scores_are_of_the_whole_confusion_matrix():
    confusion = torch.zeros(11, 11, dtype=torch.long)
    confusion[0, 0], confusion[0, 1], confusion[1, 1] = 6, 2, 4
    result = scores(confusion)
    assert result["iou"]["sky"] == 75.0 and result["iou"]["building"] == 66.67
    assert result["miou"] == 70.83  # classes that occur nowhere do not count
    assert result["pixel_accuracy"] == 83.33


@pytest.mark.parametrize("factor", [2, 3])
def test_a_widened_segmenter_computes_the_same(factor):
    narrow = SegmenterForSemanticSegmentation.from_pretrained(EXAMPLES / "assets" / "segmenter-camvid").eval()
    torch.manual_seed(0)
    image = torch.randn(1, 3, 160, 240)
    with torch.no_grad():
        before = narrow(image).logits
        same = widened(narrow, factor).eval()
        torch.testing.assert_close(same(image).logits, before, atol=1e-4, rtol=1e-4)
        noisy = widened(narrow, factor, noise=0.02).eval()
        assert 1e-3 < (noisy(image).logits - before).abs().mean() < 0.2 * before.std()
    assert same.config.encoder_config.hidden_size == factor * 192
    assert same.config.encoder_config.num_attention_heads == factor * 3


def test_training_goes_on_from_a_widened_segmenter(camvid, tmp_path):
    source = EXAMPLES / "assets" / "segmenter-camvid"
    run("widen_segmenter.py", "--model", source, "--output", tmp_path / "wide")
    assert AutoImageProcessor.from_pretrained(tmp_path / "wide").size == {"shortest_edge": 720}
    train = ["--data", camvid, "--batch-size", 1, "--max-minutes", 1e9, "--epochs", 0.5]
    run("train_segmenter.py", *train, "--init", tmp_path / "wide", "--output", tmp_path / "run")
    trained = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "run" / "best")
    assert trained.config.encoder_config.hidden_size == 384


def masked_pretraining(**fields):
    torch.manual_seed(0)
    model = small_segmenter((23, 30), 64, 3, 1)
    model.set_attn_implementation("eager")
    return MaskedPretraining(model, (23, 30), by_cells=True, **fields)


def loss_and_latents(masked, images, grid=(8, 12)):
    """The loss, and what the decoder gets to know of the visible tokens, with the same masks each time."""
    seen = []
    handle = masked.narrow.register_forward_hook(lambda module, args, out: seen.append(out[:, 1:]))
    torch.manual_seed(1)
    with torch.no_grad():
        loss = masked(images, torch.tensor([[0, 0], [5, 7]]), grid, keep=0.25)
    handle.remove()
    return loss, seen[0]


def test_one_patch_of_every_cell_is_visible():
    order = order_by_cells(5, (4, 6))
    assert (order.sort(1).values == torch.arange(24)).all() and len(order[:, :6].unique(dim=0)) > 1
    rows, columns = order[:, :6] // 6, order[:, :6] % 6
    assert (rows // 2 * 3 + columns // 2 == torch.arange(6)).all()


@pytest.mark.parametrize("clustering", ["local_kmeans", "density_peaks", "ward"])
def test_pretraining_with_every_token_its_own_representative_is_the_plain_one(clustering):
    images = torch.randn(2, 3, 8 * 16, 12 * 16)
    plain, latents = loss_and_latents(masked_pretraining(), images)
    whole, same = loss_and_latents(masked_pretraining(reduction=Reduction(1, 24, clustering)), images)
    torch.testing.assert_close(same, latents, atol=1e-5, rtol=1e-4)
    assert whole == pytest.approx(plain.item(), abs=1e-5)
    _, reduced = loss_and_latents(masked_pretraining(reduction=Reduction(1, 6, clustering)), images)
    assert not torch.allclose(reduced, latents, atol=1e-3)


def test_layers_after_the_clustering_run_on_representatives_and_hidden_patches_have_no_part_in_it():
    masked, images = masked_pretraining(reduction=Reduction(1, 6, "local_kmeans")), torch.randn(2, 3, 8 * 16, 12 * 16)
    lengths = []
    for layer in masked.encoder.layers:
        layer.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    _, latents = loss_and_latents(masked, images)
    assert lengths == [1 + 24, 1 + 6, 1 + 6]
    torch.manual_seed(1)
    visible = order_by_cells(2, (8, 12))[:, :24]
    is_visible = torch.zeros(2, 96).scatter(1, visible, 1.0).view(2, 1, 8, 12)
    is_visible = is_visible.repeat_interleave(16, 2).repeat_interleave(16, 3).bool()
    _, same = loss_and_latents(masked, torch.where(is_visible, images, torch.randn_like(images)))
    assert torch.equal(same, latents)


def test_pretraining_reduced_from_the_command_line(camvid, tmp_path, monkeypatch):
    small = ["--data", camvid, "--batch-size", 2, "--width", 64, "--layers", 2, "--decoder-layers", 1]
    options = [*small, "--output", tmp_path, "--steps", 2, "--masks", "cells", "--ailurus", "1,12"]
    monkeypatch.setattr(sys, "argv", ["pretrain_masked.py", *map(str, options)])
    pretrain_masked.main()
    report = json.loads((tmp_path / "pretraining.json").read_text())
    assert report["steps"] == 2 and report["minutes"] > 0 and report["args"]["ailurus"] == [1, 12]


def test_time_of_pretraining_reduced_and_plain(camvid):
    plain, reduced = pretrain_speed.measure(camvid, [64], 1, ["0,1"], steps=1, repeats=1)
    assert (plain["share_of_plain"], plain["num_clusters"], reduced["num_clusters"]) == (1, None, 1)
    assert reduced["share_of_plain"] == reduced["seconds"] / plain["seconds"]


def test_runs_from_pretraining_are_compared_by_seed(tmp_path):
    def pretrained(name, ailurus, steps):
        (tmp_path / name).mkdir()
        report = {"steps": steps, "loss": 0.6, "args": {"ailurus": ailurus}}
        (tmp_path / name / "pretraining.json").write_text(json.dumps(report))
        return str(tmp_path / name)

    def run_from(init, seed, miou):
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        metrics = {"args": {"init": init, "seed": seed}, "history": [{"miou": 1.0}, {"miou": miou, "images": 80}]}
        (folder / "metrics.json").write_text(json.dumps(metrics))
        return folder

    plain, reduced, longer = pretrained("a", None, 10), pretrained("b", [1, 12], 10), pretrained("c", [1, 12], 12)
    given = [(None, 0, 20.0), (reduced, 0, 29.0), (reduced, 1, 35.0), (plain, 0, 30.0), (plain, 1, 32.0)]
    rows = pretrain_quality.gathered([run_from(*each) for each in [*given, (longer, 1, 30.0), (longer, 2, 70.0)]])
    assert [row["pretraining"] for row in rows] == ["plain", "none", "reduced", "reduced"]
    assert [row["behind"] for row in rows] == [None, 10, -1, 2]  # of the seeds that both have
    assert [row["miou"] for row in rows] == [31, 20, 32, 50] and [row["spread"] for row in rows] == [2, None, 6, 40]
    assert [row.get("steps") for row in rows] == [10, None, 10, 12] and rows[2]["num_clusters"] == 12


@pytest.mark.parametrize(
    "options, told",
    [
        (["--ailurus", "2,12"], "needs --masks cells"),
        (["--masks", "cells", "--ailurus", "8,12"], "L from 0 to 7"),
        (["--masks", "cells", "--ailurus", "2,49"], "M from 1 to 48"),
        (["--masks", "cells", "--grid", "11", "16"], "even sides, got 11 16"),
    ],
)
def test_what_pretraining_cannot_do_is_refused(options, told, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrain_masked.py", "--output", "nowhere", *options])
    with pytest.raises(SystemExit):
        pretrain_masked.main()
    assert told in capsys.readouterr().err
