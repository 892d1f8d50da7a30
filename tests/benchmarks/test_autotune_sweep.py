"""The sweep that autotune is held against: every setting once, the pick and the best judged by the same runs."""

import json

import pytest
from models import images_for, make_model

from ailurus_hf.evaluation.search import Candidate
from ailurus_hf.evaluation.tuned_models import ModelSubject
from benchmarks.vision import autotune_sweep

NAME = "Dinov2ForImageClassification"


def subject():
    return ModelSubject(make_model(NAME), list(images_for(NAME, batch=2).split(1)))


def test_every_setting_of_the_search_is_in_the_sweep_once():
    found = autotune_sweep.all_settings(subject())
    labels = [each.label for each in found]
    assert len(labels) == len(set(labels)) == len({each.config.to_json() for each in found})
    clusterings = {each.config.clustering for each in found}
    assert {"local_kmeans", "ward", "pairs"} <= clusterings


def test_rows_of_both_goals(monkeypatch, tmp_path):
    monkeypatch.setattr("ailurus_hf.evaluation.tuned_models.KEEP_RATIOS", (0.5, 0.25))
    goals = [("max_loss", 1.0), ("speedup", 1.01)]
    found = autotune_sweep.measure(subject(), goals, 1, lambda settings: autotune_sweep.sweep(subject(), settings))
    assert [row["goal"] for row in found["rows"]] == ["max_loss 1", "speedup 1.01"]
    labels = {each["label"] for each in found["sweep"]}
    for row in found["rows"]:
        assert {row["pick"], row["best"]} <= labels
        assert set(autotune_sweep.COLUMNS) <= set(row)
    # The best is the best of all that the sweep saw.
    assert found["rows"][0]["best_speed_up"] == max(each["speed_up"] for each in found["sweep"])
    assert found["rows"][0]["falls_short"] >= 0
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps(found))
    again = autotune_sweep.measure(subject(), goals[:1], 1, lambda settings: autotune_sweep.saved_sweep(file))
    assert again["rows"][0]["best"] == found["rows"][0]["best"] and again["sweep"][0]["label"] in labels


@pytest.mark.parametrize(("goal", "share"), [(("max_loss", 0.2), 0.25), (("speedup", 1.2), 0.1)])
def test_how_far_behind(goal, share):
    pick, best = Candidate(None, "pick"), Candidate(None, "best")
    pick.ratios, best.ratios = [1.5, 1.5], [2.0, 2.0]
    pick.losses, best.losses = {0: 0.19}, {0: 0.1}
    assert autotune_sweep.falls_short(pick, best, goal) == pytest.approx(share)
