"""The sweep that autotune is held against: every setting once, the pick and the best judged by the same runs."""

import json

import pytest
import torch
import transformers as hf
from models import images_for, make_model

from ailurus_hf import AiluRusConfig, ailurus_status
from ailurus_hf.evaluation.autotune import tune
from ailurus_hf.evaluation.search import Candidate, choose
from ailurus_hf.evaluation.tuned_models import ModelSubject
from benchmarks.harness import RESULTS
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


def test_rows_of_both_goals(monkeypatch):
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
    rows = json.loads(json.dumps(found["sweep"]))
    again = autotune_sweep.measure(subject(), goals[:1], 1, lambda settings: autotune_sweep.candidates_of(rows))
    assert again["rows"][0]["best"] == found["rows"][0]["best"] and again["sweep"][0]["label"] in labels


@pytest.mark.parametrize(("goal", "share"), [(("max_loss", 0.2), 0.25), (("speedup", 1.2), 0.1)])
def test_how_far_behind(goal, share):
    pick, best = Candidate(None, "pick"), Candidate(None, "best")
    pick.ratios, best.ratios = [1.5, 1.5], [2.0, 2.0]
    pick.losses, best.losses = {0: 0.19}, {0: 0.1}
    assert autotune_sweep.falls_short(pick, best, goal) == pytest.approx(share)


class Recorded:
    """A subject with the speeds and losses of a recorded sweep, and a clock of its own; `noise` of time and loss.

    Inputs differ in how much is lost on them, and the first one is the hardest.
    """

    device, precision, loss_means, num_inputs = torch.device("cpu"), "float32", "recorded", 32

    def __init__(self, rows, noise):
        self.rows, self.noise, self.now = rows, noise, 0.0
        config = hf.ViTConfig(hidden_size=8, num_hidden_layers=8, num_attention_heads=1, intermediate_size=8)
        self.target, self.generator = hf.ViTModel(config), torch.Generator().manual_seed(0)
        self.settings = ModelSubject(self.target, [])
        self.labels = {each.config.to_json(): each.label for each in autotune_sweep.all_settings(self.settings)}

    def around(self, value):
        return value * (1 + self.noise * float(torch.randn((), generator=self.generator)))

    def run(self, index):
        status = ailurus_status(self.target)
        label = self.labels[AiluRusConfig.from_dict(status.config).to_json()] if status.active else None
        self.now += self.around(1.0 if label is None else 1 / self.rows[label]["speed_up"])
        return label

    def loss(self, plain, reduced, index):
        return self.around(self.rows[reduced]["loss"] * (2.0, 0.6, 1.1, 0.7, 0.9, 1.3, 0.8, 0.6)[index % 8])

    def ideal(self):
        return None

    def first(self):
        return [each for each in self.settings.first() if each.label in self.rows]

    def variants(self, candidate):
        return [each for each in self.settings.variants(candidate) if each.label in self.rows]


@pytest.mark.parametrize("goal", [("max_loss", 0.01), ("max_loss", 0.02), ("speedup", 2.0)])
def test_autotune_finds_what_a_recorded_sweep_of_the_shipped_model_found(goal):
    """Its best for 2 % is Ward's on a setting that itself loses 2.6 %: the settings differ in what they gain by it."""
    sweep = json.loads((RESULTS / "cpu" / "autotune_sweep-fp32.json").read_text())["sweep"]
    recorded = Recorded({row["label"]: row for row in sweep}, noise=0.03)
    tuned = tune(recorded, goal, progress=False, timer=lambda: recorded.now)
    every = [Candidate(None, row["label"], ratios=[row["speed_up"]], losses={0: row["loss"]}) for row in sweep]
    pick = next(each for each in every if each.label == tuned.rows[tuned.chosen].label)
    assert autotune_sweep.falls_short(pick, choose(every, goal).best, goal) < 0.05
    assert tuned.num_tried < 0.6 * len(every)
