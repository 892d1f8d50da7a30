"""Intervals over images: against a loop over resamples, a case worked by hand, and in the tables of `report_tables`."""

import json

import numpy as np
import pytest

from ailurus_hf.evaluation.comparison import mean_iou
from benchmarks import report_tables
from benchmarks.harness.bootstrap import called, drawn_weights, interval, resampled_scores
from benchmarks.vision import quality, segmenter_quality


def task(score=mean_iou):
    return quality.Scored("miou", [], [], None, None, None, None, score, 0)


def test_scores_of_resamples_are_those_of_a_loop():
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 50, (7, 3, 3))
    weights = drawn_weights(7, 40, np.random.default_rng(5))
    drawn = np.random.default_rng(5).integers(7, size=(40, 7))
    expected = [mean_iou(sum(counts[image] for image in images)) for images in drawn]
    np.testing.assert_allclose(resampled_scores(counts, weights, mean_iou), expected, rtol=1e-12)
    assert (weights.sum(1) == 7).all()
    # The same seed, the same draws; and nothing of numpy's own generator.
    np.random.seed(0)
    assert np.array_equal(weights, drawn_weights(7, 40, np.random.default_rng(5)))
    assert np.random.randint(1000) == np.random.RandomState(0).randint(1000)


def test_two_images_by_hand():
    # Two classes of 10 pixels an image. The first image is right, in the second all of class 1 is taken for class 0.
    right, wrong = np.array([[5, 0], [0, 5]]), np.array([[5, 0], [5, 0]])
    weights = np.array([[2.0, 0], [1, 1], [0, 2]])
    values = resampled_scores(np.stack([right, wrong]), weights, mean_iou)
    # Both: intersections 10 and 5, unions 15 and 10. The second alone: 1/2 and 0.
    np.testing.assert_allclose(values, [1, (10 / 15 + 5 / 10) / 2, 0.25])
    assert interval(np.arange(101.0)) == pytest.approx([2.5, 97.5])
    assert [called(x, "a loss", "a gain") for x in ([0.1, 2], [-1, 0.5], [0, 1], [-2, -1])] == [
        "a loss",
        "may be chance",
        "may be chance",
        "a gain",
    ]


def test_differences_are_of_the_same_images():
    # Images differ much from each other; one model is right on a pixel less in each, another is no different.
    sizes = np.array([10, 100, 1000, 30, 300])
    plain = np.stack([np.diag([n, n]) for n in sizes])
    worse = plain + np.array([[-1, 1], [0, 0]])
    contenders = {"a": ("A", 2, 0.5, None), "b": ("B", 2, 0.5, None), "c": ("B", 2, 0.25, None)}
    counts = {"plain": plain, "a": worse, "b": plain.copy(), "c": worse}
    resampling = quality.Resampling(np.random.default_rng(0), 200, against="A")
    found = quality.intervals(task(), counts, contenders, resampling)
    assert found["plain"] == {"score_between": [1, 1]}
    low, high = found["a"]["lost_between"]
    assert 0 < low < 1 - mean_iou(worse.sum(0)) < high and found["a"]["lost_is"] == "a loss"
    assert found["b"]["lost_between"] == [0, 0] and found["b"]["lost_is"] == "may be chance"
    # Beside A at the same keep ratio; at another there is no A.
    assert found["b"]["reference"] == "A" and found["b"]["behind_is"] == "ahead"
    assert found["b"]["behind"] == pytest.approx(mean_iou(worse.sum(0)) - 1)
    assert "reference" not in found["a"] and "reference" not in found["c"]


def test_tables_have_intervals_where_they_were_measured(tmp_path, monkeypatch):
    rows = [{"method": "plain", "miou": 60.0, "speed_up": 1.0, "ms": 9.0}]
    more = {"location": 2, "restore_location": None, "num_clusters": 9, "speed_up": 2.0, "ms": 5.0}
    rows.append({"method": "A", "miou": 59.8, "lost": 0.2, **more})
    about = {"device": "a CPU", "precision": "fp32", "versions": {}, "date": "today", "command": "it", "images": 3}
    (tmp_path / "cpu").mkdir()
    file = tmp_path / "cpu/segmenter_quality-fp32.json"
    monkeypatch.setattr(report_tables, "RESULTS", tmp_path)
    whole = report_tables.rows_as_measured("cpu/segmenter_quality-fp32", segmenter_quality.COLUMNS)
    file.write_text(json.dumps({**about, "rows": rows}))
    assert "95 %" not in whole() and "| **59.8** (2.00×) |" in report_tables.quality_table()
    assert "+0.20 (L 2, M 9, 2.00×)" in report_tables.equal_speed_table()
    rows[1] |= {"score_between": [58.0, 61.25], "lost_between": [-0.3, 0.7], "lost_is": "may be chance"}
    file.write_text(json.dumps({**about, "rows": rows}))
    assert "| 59.80 | 58.00 to 61.25 | +0.20 | -0.30 to +0.70 | may be chance |" in whole()
    assert "| 60.00 | – | – | – | – |" in whole()
    assert (
        "| **59.8 ≈** (2.00×) |" in report_tables.quality_table()
        and "≈: the loss may be chance" in report_tables.quality_table()
    )
    assert "+0.20 [-0.30, +0.70], may be chance, (L 2, M 9, 2.00×)" in report_tables.equal_speed_table()
