"""AP of reduced detectors: COCO's own code on any choice of the images, and the benchmark on a tiny random detector."""

import json

import numpy as np
import pytest
import torch
import torchvision_ops
import transformers as hf
from PIL import Image
from safetensors.torch import save_model

from ailurus_hf import AiluRusConfig, AiluRusError, apply_ailurus
from ailurus_hf.evaluation.average_precision import average_precision, matched_boxes, precision_of
from ailurus_hf.evaluation.boxes import Boxes, Truth
from benchmarks.harness.datasets import DetectionData
from benchmarks.methods import PAPER, Amount
from benchmarks.peers import expedite, hooks
from benchmarks.vision import detection_quality, detectors
from benchmarks.vision.quality import Resampling, reduced_copy

SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
FIELDS = {"min_size": 64, "max_size": 96, "box_score_thresh": 0.0, "box_detections_per_img": 8}
FIELDS |= {"rpn_pre_nms_top_n_test": 12, "rpn_post_nms_top_n_test": 12}


def random_boxes(rng, images=9):
    found, truth = [], []
    for _ in range(images):
        corners = rng.uniform(0, 50, (6, 4))
        corners[:, 2:] += corners[:, :2] + 5
        labels = rng.integers(1, 4, 6)
        truth.append(Truth(corners, labels, rng.random(6) < 0.1))
        found.append(Boxes(corners + rng.normal(0, 2, (6, 4)), labels, np.sort(rng.random(6))[::-1]))
    return found, truth


def test_precision_of_a_choice_is_that_of_these_images_alone():
    found, truth = random_boxes(np.random.default_rng(0))
    matched = matched_boxes(found, truth)
    whole = precision_of(matched)
    assert 0.05 < whole[0] < whole[1] < 1 and whole[0] == average_precision(found, truth)
    for images in ([0, 0, 3, 8, 8, 8, 5, 1, 2], [4, 2], range(9)):
        alone = matched_boxes([found[i] for i in images], [truth[i] for i in images])
        assert precision_of(matched, images) == pytest.approx(precision_of(alone), abs=1e-12)
    assert precision_of(matched) == whole  # nothing was left behind


def test_a_class_that_is_not_drawn_counts_neither_way():
    corners = np.array([[0, 0, 10, 10]], float)
    truth = [Truth(corners, np.array([label]), np.zeros(1, bool)) for label in (1, 2)]
    found = [Boxes(corners, np.array([1]), np.array([0.9]))] * 2
    matched = matched_boxes(found, truth)
    assert precision_of(matched, [0, 0]) == pytest.approx((1, 1))
    assert precision_of(matched, [1, 1]) == (0, 0)
    # Class 1 is found at once and once too often with the same score: 1 for it, 0 for class 2.
    assert precision_of(matched, [0, 1]) == pytest.approx((0.5, 0.5))
    empty = matched_boxes(found, [truth[0], Truth(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0, bool))])
    assert np.isnan(precision_of(empty, [1, 1])).all()


@pytest.fixture(scope="module")
def with_torchvision():
    with torchvision_ops.in_reach() as found:
        if not found:
            pytest.skip("torchvision is not installed: pip install 'ailurus-hf[detection]'")
        yield


@pytest.fixture
def run(tmp_path, with_torchvision):
    """What the training script leaves of a random detector; its own boxes are the true ones of two images of three."""
    from ailurus_hf.detection.detector import faster_rcnn

    torch.manual_seed(0)
    encoder = hf.ViTModel(hf.ViTConfig(**SIZES, image_size=64, patch_size=8))
    for parameter in encoder.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    detector = faster_rcnn(encoder, 4, out_channels=16, **FIELDS)
    folder = tmp_path / "run"
    (folder / "state").mkdir(parents=True)
    encoder.config.save_pretrained(folder)
    save_model(detector, folder / "state/model.safetensors")
    about = {"num_classes": 4, "masks": False, "taps": None, "out_channels": 16, "fields": FIELDS}
    (folder / "detector.json").write_text(json.dumps(about))
    (folder / "progress.json").write_text(json.dumps({"epochs": 1, "minutes": 2.5}))
    write_data(tmp_path, detector.eval())
    return folder


@torch.no_grad()
def write_data(folder, detector):
    rng = np.random.default_rng(0)
    for part in ("val", "annotations"):
        (folder / part).mkdir()
    images, annotations = [], []
    for number in range(3):
        Image.fromarray(rng.integers(0, 255, (64, 80, 3), dtype=np.uint8)).save(folder / f"val/{number}.png")
        images.append({"id": 7 + number, "file_name": f"{number}.png"})
        (found,) = detector([detection_quality.pixels(Image.open(folder / f"val/{number}.png"))])
        for (x0, y0, x1, y1), label in zip(found["boxes"][:4].tolist(), found["labels"].tolist()):
            box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "category_id": label, "image_id": 7 + number, "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, **box})
    listed = {"images": images, "annotations": annotations}
    (folder / "annotations/instances_val.json").write_text(json.dumps(listed))


def test_data_in_the_format_of_coco(run):
    data = DetectionData("made up", run.parent)
    assert len(data) == 3 and data.image(1).size == (80, 64) and data.image(1).mode == "RGB"
    truth = data.truth(2)
    assert truth.corners.shape == (4, 4) and (truth.corners[:, 2:] > truth.corners[:, :2]).all()
    assert len(DetectionData("made up", run.parent, limit=2)) == 2
    with pytest.raises(AiluRusError, match=r"instances_test\.json is missing"):
        DetectionData("made up", run.parent, "test")


def test_every_kind_of_method_beside_the_plain_detector(run):
    detector, data = detection_quality.load_detector(run), DetectionData("made up", run.parent)
    names = [PAPER, "Ward, smooth", "Ward, residual", "Expedite", "ToMe:r=8", "random centers, copy"]
    contenders = {name: (name, 1, 0.25, None) for name in names} | {"whole": ("Ward, copy", 1, 1.0, None)}
    resampling = Resampling(np.random.default_rng(0), 20, against="Ward, smooth")
    plain, *rows = detection_quality.measure(detector, data, contenders, 1, resampling)
    # The truth is what the plain detector finds best; it finds more, which counts against it.
    assert plain["ap"] > 80 and plain["speed_up"] == plain["agreement"] == 1
    assert [row["method"] for row in rows] == [*names, "Ward, copy"]
    whole = rows.pop()
    assert (whole["lost"], whole["lost50"], whole["agreement"]) == (0, 0, 1) and whole["lost_between"] == [0, 0]
    for row in rows:
        # 64 x 80 pixels in patches of 8: a grid of 8 x 10, of which Expedite keeps cells.
        assert row["num_clusters"] == {"ToMe:r=8": 80 - 4 * 8}.get(row["method"], 20)
        assert row["ideal"] > 1 and row["gflops"] < plain["gflops"] and row["ms"] > 0
        assert row["detector_ms"] > 0 and row["share_of_ideal"] == row["speed_up"] / row["ideal"]
        assert row["lost"] == pytest.approx(plain["ap"] - row["ap"]) and row["lost"] > 0
        low, high = row["lost_between"]
        assert low <= high and row["lost_is"] in ("a loss", "a gain", "may be chance") and "lost50_between" in row
        assert ("behind_between" in row) == (row["method"] != "Ward, smooth")
    # The same on the detector itself, which all of it has left alone.
    for row in (plain, rows[1]):
        if row is not plain:
            apply_ailurus(detector, AiluRusConfig.from_dict(row["settings"]))
        found = detection_quality.found_boxes({"it": detector}, data, torch.device("cpu"))["it"]
        ap = average_precision(found, [data.truth(index) for index in range(3)])
        assert ap == pytest.approx(row["ap"] / 100)


def test_peers_unmerge_what_the_detector_reads_and_no_more(run, monkeypatch):
    """Of four layers that are read the first comes before the merge; the last has its tokens back already."""
    encoder, images = detection_quality.encoder_alone(detection_quality.load_detector(run)), torch.randn(1, 3, 64, 80)
    unmerged, back = [], hooks.Peer.back
    monkeypatch.setattr(hooks.Peer, "back", lambda *args: (unmerged.append(1), back(*args))[1])
    with torch.no_grad(), expedite.apply(encoder, location=1, cells=(4, 5)):
        assert {each.shape[2:] for each in encoder(images).values()} == {(8, 10)}
        assert len(unmerged) == 3
        encoder.taps = (4,) * 4
        encoder(images)
        assert len(unmerged) == 3 + 1


def test_the_command_saves_what_was_measured_and_how_it_was_trained(run, monkeypatch, capsys):
    saved = []
    monkeypatch.setattr(detection_quality, "save", lambda *args: saved.append(args))
    options = ["--data", str(run.parent), "--model", str(run), "--methods", "grid pooling, copy", "--settings", "1,0.5"]
    monkeypatch.setattr("sys.argv", ["detection_quality", *options, "--resamples", "5", "--repeats", "0"])
    detection_quality.main()
    ((name, rows, about),) = saved
    assert name == "detection_quality" and len(rows) == 2 and json.dumps([rows, about])
    assert "speed_up" not in rows[0] and rows[1]["ideal"] > 1
    assert about["training"] == {"epochs": 1, "minutes": 2.5} and about["images"] == 3
    assert "| grid pooling, copy | 1 | 40 |" in capsys.readouterr().out


def test_settings_of_the_paper():
    assert detection_quality.settings_of_table_4(12) == [(3, 0.387), (3, 0.527), (6, 0.431), (7, 0.431)]
    assert [location for location, _ in detection_quality.settings_of_table_4(8)] == [2, 2, 4, 5]


def test_a_dry_run_needs_nothing_and_saves_nothing(monkeypatch, capsys):
    monkeypatch.setattr(detection_quality, "save", lambda *args: pytest.fail("saved"))
    options = ["--tiny", "--settings", "1,0.5", "--repeats", "1", "--resamples", "3", "--at-speed", "0"]
    monkeypatch.setattr("sys.argv", ["detection_quality", *options])
    detection_quality.main()
    first, second = capsys.readouterr().out.split("\nAt 0.0 times")
    # On a YOLOS of 4 x 6 patches the peers of others do not run, and ours keep 12.
    for table in (first, second):
        assert "| Ward, residual | 1 | 12 |" in table and "detector's speed-up" in table and "ToMe" not in table


def test_ap_that_was_measured_before_is_kept_and_timed(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(detection_quality, "save", lambda *args: saved.append(args))
    monkeypatch.setattr(detection_quality, "load_detector", lambda _: detectors.tiny_detector())
    monkeypatch.setattr(detection_quality, "how_trained", lambda _: {})
    same = ["detection_quality", "--data", str(detectors.made_up_data(tmp_path)), "--model", "it"]
    methods = ["--methods", "Ward, copy", "Ward, smooth", "--settings", "1,0.5", "2,0.25"]
    monkeypatch.setattr("sys.argv", [*same, *methods, "--repeats", "0", "--resamples", "3"])
    detection_quality.main()
    ((_, rows, about),) = saved
    rows[1]["ap"] = 12.5  # no detector's
    (tmp_path / "before.json").write_text(json.dumps({**about, "date": "then", "rows": rows}))
    monkeypatch.setattr(detection_quality, "found_boxes", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr("sys.argv", [*same, "--ap-of", str(tmp_path / "before.json"), "--repeats", "1"])
    detection_quality.main()
    _, again, about = saved[1]
    assert "speed_up" not in rows[1] and all(row["speed_up"] > 0 for row in again)
    assert [{key: row[key] for key in before} for row, before in zip(again, rows, strict=True)] == rows
    assert about["resamples"] == 3 and about["ap_of"]["date"] == "then"


def test_of_each_method_the_slowest_row_that_is_fast_enough():
    speeds = [("one", 2.0), ("one", 1.5), ("one", 1.4), ("two", 1.2), ("three", 3.0)]
    rows = [{"method": name, "speed_up": speed} for name, speed in [("plain", 1.0), *speeds]]
    chosen = [(row["method"], row["speed_up"]) for row in detection_quality.rows_at(rows, 1.5)]
    assert chosen == [("plain", 1.0), ("one", 1.5), ("three", 3.0)]


@torch.no_grad()
def test_a_reduced_yolos_is_measured_on_its_own_boxes(tmp_path):
    detector, data = detectors.tiny_detector(), DetectionData("made up", detectors.made_up_data(tmp_path))
    image = detection_quality.pixels(data.image(0))
    (found,) = detector([image])
    assert (found["scores"].diff() <= 0).all() and found["boxes"].shape == (4, 4)
    method, encoder = ("Ward, copy", 1, 0.25, None), detectors.encoder_alone(detector)
    _, row = detection_quality.measure(detector, data, {"ours": method}, 0)
    assert row["num_clusters"] == 6 and row["ideal"] > 1
    reduced, _ = reduced_copy(encoder, method[0], Amount(*method[1:]), [detectors.seen(detector, image)])
    (boxes,) = detectors.with_encoder(detector, reduced)([image])
    apply_ailurus(detector, AiluRusConfig.from_dict(row["settings"]))
    torch.testing.assert_close(boxes, detector([image])[0])
    assert not torch.equal(boxes["boxes"], found["boxes"])
