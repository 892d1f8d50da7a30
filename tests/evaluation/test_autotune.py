"""autotune: the right setting by a clock that is known, undone, interrupted, saved, and for pipelines."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusion_models import make_pipeline
from models import images, make_model, predict
from torch import nn
from traces import traces
from transformer_pipelines import make_transformer_pipeline

from ailurus_hf import (
    AiluRusConfig,
    AiluRusDiffusionConfig,
    AiluRusError,
    ailurus_enabled,
    ailurus_status,
    apply_ailurus,
    autotune,
)
from ailurus_hf.evaluation import agreement, counted_flops, search
from ailurus_hf.evaluation.autotune import tune
from ailurus_hf.evaluation.search import Candidate, usable
from ailurus_hf.evaluation.tuned import Tuned
from ailurus_hf.evaluation.tuned_models import ModelSubject
from ailurus_hf.evaluation.tuned_pipelines import PipelineSubject
from ailurus_hf.vision.auto import AiluRusModelForImageClassification

NAME = "ViTForImageClassification"


class Known:
    """A subject whose speeds and losses are known: by keep ratio and clustering, with a clock of its own."""

    device, precision, loss_means, num_inputs = torch.device("cpu"), "float32", "known", 12

    def __init__(self, jitter=0.0):
        self.target, self.now, self.runs = make_model(NAME), 0.0, 0
        self.jitter = torch.Generator().manual_seed(0), jitter

    def seconds(self, config):
        if config is None:
            return 1.0
        return config["keep_ratio"] + {"local_kmeans": 0.02, "ward": 0.1, "pairs": 0.01}[config["clustering"]]

    def known_loss(self, config):
        lost = (1 - config["keep_ratio"]) ** 2 / 10
        return lost * {"local_kmeans": 1.0, "ward": 0.5, "pairs": 2.0}[config["clustering"]]

    def run(self, index):
        self.runs += 1
        config = ailurus_status(self.target).config
        generator, width = self.jitter
        self.now += self.seconds(config) * (1 + width * float(torch.randn((), generator=generator)))
        return config

    def loss(self, plain, reduced, index):
        return self.known_loss(reduced) * (1 + 0.02 * (index % 3 - 1))

    def ideal(self):
        return None

    def first(self):
        ratios = (0.75, 0.5, 0.35, 0.25, 0.15)
        return [Candidate(AiluRusConfig(cluster_location=1, keep_ratio=r), f"{r} local_kmeans") for r in ratios]

    def variants(self, candidate):
        ratio = candidate.config.keep_ratio
        return [
            Candidate(AiluRusConfig(cluster_location=1, keep_ratio=ratio, clustering=c), f"{ratio} {c}")
            for c in ("ward", "pairs")
        ]

    def exhaustive(self):
        every = [c for one in self.first() for c in (one, *self.variants(one))]
        return {c.label: (1 / self.seconds(vars_of(c)), self.known_loss(vars_of(c))) for c in every}


def vars_of(candidate):
    return {"keep_ratio": candidate.config.keep_ratio, "clustering": candidate.config.clustering}


@pytest.mark.parametrize("goal", [("speedup", 1.9), ("speedup", 3.0), ("max_loss", 0.02), ("max_loss", 0.04)])
def test_finds_what_an_exhaustive_search_finds(goal):
    known = Known()
    every, (kind, wanted) = known.exhaustive(), goal
    if kind == "speedup":
        want = min((label for label in every if every[label][0] >= wanted), key=lambda label: every[label][1])
    else:
        want = max((label for label in every if every[label][1] <= wanted), key=lambda label: every[label][0])
    tuned = tune(known, goal, progress=False, timer=lambda: known.now)
    assert tuned.rows[tuned.chosen].label == want and tuned.reached
    assert tuned.confident and tuned.note == "" and tuned.best == tuned.rows[tuned.chosen].config
    # And without running every setting on every input.
    assert known.runs < 0.7 * 16 * known.num_inputs
    assert not ailurus_status(known.target).active


def test_times_that_tell_nothing_are_no_confident_choice():
    known = Known(jitter=0.3)
    tuned = tune(known, ("max_loss", 1.0), rounds=1, progress=False, timer=lambda: known.now)
    assert not tuned.confident and "The choice may be chance" in tuned.note and "may be as fast" in tuned.note
    more = Known(jitter=0.3)
    tune(more, ("max_loss", 1.0), rounds=3, progress=False, timer=lambda: more.now)
    assert more.runs > known.runs


def test_more_turns_end_where_the_choice_is_settled():
    """In the middle of a round: a round of 32 images takes a minute."""
    one, two = Known(jitter=0.058), Known(jitter=0.058)
    first = tune(one, ("max_loss", 1.0), rounds=1, progress=False, timer=lambda: one.now)
    second = tune(two, ("max_loss", 1.0), rounds=4, progress=False, timer=lambda: two.now)
    assert not first.confident and second.confident
    assert two.runs - one.runs == 2 * 8 * 3  # the plain model and the two settings of four that may yet be chosen


def test_a_goal_that_nothing_reaches_gets_the_nearest_and_says_so():
    known = Known()
    tuned = tune(known, ("speedup", 50.0), progress=False, timer=lambda: known.now)
    assert not tuned.reached and not tuned.confident and "No setting reaches speedup 50" in tuned.note
    assert tuned.chosen == 0 and tuned.rows[0].speed_up == max(row.speed_up for row in tuned.rows)


def test_an_interrupt_gives_what_was_found():
    class Stops(Known):
        def run(self, index):
            if self.runs == 40:
                raise KeyboardInterrupt
            return super().run(index)

    known = Stops()
    tuned = tune(known, ("max_loss", 0.04), progress=False, timer=lambda: known.now)
    assert tuned.interrupted and not tuned.confident and "interrupted" in tuned.note and tuned.rows
    assert not ailurus_status(known.target).active
    at_once = Stops()
    at_once.runs = 40
    with pytest.raises(KeyboardInterrupt):
        tune(at_once, ("max_loss", 0.04), progress=False, timer=lambda: at_once.now)


def test_a_model_is_left_as_it_was_and_takes_what_was_found(tmp_path):
    model, x = make_model(NAME), images(1)
    plain, before = predict(model, NAME, x), traces(model)
    inputs = [{"pixel_values": images(1, seed=seed), "interpolate_pos_encoding": True} for seed in range(4)]
    tuned = autotune(model, inputs, pareto=True, rounds=1, progress=False)
    assert torch.equal(predict(model, NAME, x), plain) and traces(model) == before
    assert tuned.num_tried > len(tuned.rows) and tuned.loss_means == agreement.MEANING["labels"]
    assert all(row.loss_low <= row.loss <= row.loss_high for row in tuned.rows)
    assert tuned.rows[tuned.chosen].label in str(tuned) and "speed-up" in tuned.table()

    path = tmp_path / "tuned.json"
    tuned.save(path)
    again = Tuned.load(path)
    assert again.best == tuned.best and again.to_dict() == tuned.to_dict()
    want = predict(tuned.apply(model), NAME, x)
    assert torch.equal(predict(apply_ailurus(make_model(NAME), path), NAME, x), want)
    assert torch.equal(predict(apply_ailurus(make_model(NAME), str(path)), NAME, x), want)
    make_model(NAME).save_pretrained(tmp_path / "model")
    loaded = AiluRusModelForImageClassification.from_pretrained(tmp_path / "model", ailurus_config=path)
    assert ailurus_status(loaded).config == tuned.best.to_dict()
    with pytest.raises(AiluRusError, match="version 1, got 9"):
        path.write_text(json.dumps({**tuned.to_dict(), "tuned_version": 9}))
        Tuned.load(path)


def test_what_flops_allow_is_of_the_plain_model():
    model = make_model(NAME)
    given = {"pixel_values": images(2)[..., :32]}
    full, subject = counted_flops(model, given), ModelSubject(model, [given])
    subject.run(0)
    with ailurus_enabled(model, cluster_location=1, keep_ratio=0.5):
        subject.run(0)
        saved = ailurus_status(model).saved_flops
        assert subject.ideal() == pytest.approx(full / 2 / (full / 2 - saved)) and saved > 0


def test_a_metric_with_labels_decides_where_it_is_given():
    model = make_model(NAME)
    inputs = [{"pixel_values": images(1, seed=seed), "interpolate_pos_encoding": True} for seed in range(3)]
    seen = []

    def metric(output, label):
        seen.append(label)
        return float(output.logits[0, label])

    tuned = autotune(model, inputs, max_loss=100.0, metric=metric, labels=[0, 1, 2], rounds=1, progress=False)
    assert tuned.reached and set(seen) == {0, 1, 2} and tuned.loss_means == "what the metric falls by"


def test_a_way_is_foreseen_also_from_a_setting_that_gained():
    base = Candidate(None, "base", ratios=[1.5], losses={0: 0.02})
    gaining = Candidate(None, "one", ratios=[2.0], losses={0: -0.01})
    other = Candidate(None, "the other", ratios=[3.0], losses={0: 0.0}, way="Ward")
    foreseen = Candidate(None, "foreseen", way="Ward")
    search.foresee([foreseen], base, {gaining: [other]})
    assert foreseen.speed_up == pytest.approx(2.25) and foreseen.loss == pytest.approx(0.02)


def test_plot_marks_the_choice():
    pytest.importorskip("matplotlib")
    known = Known()
    tuned = tune(known, ("pareto", 0.0), progress=False, timer=lambda: known.now)
    figure = tuned.plot()
    (*_, line), (beaten, front, chosen) = figure.axes[0].lines, figure.axes[0].collections
    assert chosen.get_offsets()[0].tolist() == [tuned.rows[tuned.chosen].loss, tuned.rows[tuned.chosen].speed_up]
    assert len(beaten.get_offsets()) + len(front.get_offsets()) == len(tuned.rows)
    assert len(line.get_xdata()) == len(front.get_offsets()) == len(tuned.front())


def test_a_pipeline_on_its_prompts():
    pipe = make_pipeline(StableDiffusionPipeline)
    words = [torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    prompts = [{"prompt_embeds": each, "negative_prompt_embeds": 0 * each} for each in words]
    generate = {"num_inference_steps": 2, "height": 16, "width": 16}
    candidates = [AiluRusDiffusionConfig(keep_ratio=ratio, min_tokens=12) for ratio in (0.9, 0.25)]
    tuned = autotune(pipe, prompts, max_loss=1.0, generate=generate, candidates=candidates, rounds=1, progress=False)
    assert {row.config.keep_ratio for row in tuned.rows} == {0.9, 0.25}
    by_ratio = {row.config.keep_ratio: row.loss for row in tuned.rows}
    assert 0 < by_ratio[0.9] < by_ratio[0.25] and tuned.loss_means == agreement.MEANING["pictures"]
    assert not ailurus_status(pipe).active
    with pytest.raises(AiluRusError, match="takes no steps"):
        autotune(pipe, prompts, max_loss=1.0, generate={"steps": 2}, candidates=candidates)


def test_a_pipeline_is_searched_over_levels_and_steps():
    subject = PipelineSubject(make_pipeline(StableDiffusionPipeline), ["a street"], {}, None)
    first = next(each for each in subject.first() if each.config.keep_ratio == 0.5)
    labels = {each.label for each in usable(subject.target, subject.variants(first))}
    for change in (
        "keep_ratio {'largest': 0.5}",
        "keep_ratio {1: 0.5, 2: 1.0}",
        "scope attention",
        "cluster_per resolution",
    ):
        assert f"{change}, refresh_every 2" in labels
    nothing = "full_every 3, between nothing, extrapolate True"
    for change in ("unreduced_first_steps 2", "unreduced_last_steps 2", "full_every 3", nothing):
        assert f"refresh_every 2, {change}" in labels
    assert "refresh_every 2, step_factors (0.5, 1.0, 1.5)" in labels
    assert "refresh_every 2, inner_every 3, extrapolate True, unreduced_first_steps 3" in labels
    assert "refresh_every 4" in labels


def test_variants_of_inner_layers_keep_to_them():
    subject = PipelineSubject(make_pipeline(StableDiffusionPipeline), ["a street"], {}, None)
    config = AiluRusDiffusionConfig(inner_every=2, extrapolate=True, unreduced_first_steps=3)
    variants = {each.way: each.config for each in subject.variants(Candidate(config, ""))}
    assert variants["inner layers every 3"].inner_every == 3 and not any("full" in way for way in variants)
    assert variants["attention"].extrapolate and variants["attention"].inner_every == 2
    of_full = subject.variants(Candidate(AiluRusDiffusionConfig(full_every=3, between="nothing"), ""))
    assert next(each for each in of_full if each.way == "inner layers every 2").config.full_every is None


def test_inner_layers_are_no_variants_where_there_is_no_unet():
    subject = PipelineSubject(make_transformer_pipeline("PixArt"), ["a street"], {}, None)
    assert not any("inner" in each.way for each in subject.variants(Candidate(AiluRusDiffusionConfig(), "")))


def test_full_steps_are_left_out_of_variants_of_attention_alone():
    subject = PipelineSubject(make_pipeline(StableDiffusionPipeline), ["a street"], {}, None)
    full = AiluRusDiffusionConfig(scope="attention", levels={1: {"scope": "blocks"}}, full_every=3, extrapolate=True)
    candidates = [
        AiluRusDiffusionConfig(scope="attention"),
        AiluRusDiffusionConfig(full_every=3, extrapolate=True, between="nothing"),
        full,
    ]
    ways = [{each.way for each in subject.variants(Candidate(config, ""))} for config in candidates]
    assert [{"full every 5"} <= each for each in ways] == [False, True, True]
    assert "attention" in ways[1] and "attention" in ways[2]


@pytest.mark.parametrize("name", ["SD3", "PixArt"])
def test_a_pipeline_of_a_transformer_is_searched_over_its_presets(name):
    pipe = make_transformer_pipeline(name)
    subject = PipelineSubject(pipe, ["a street"], {}, None)
    labels = {each.label for each in usable(pipe, subject.first())}
    assert {"preset 'fast'", "preset 'balanced'", "preset 'faithful'"} <= labels


@pytest.mark.parametrize(
    "fields, message",
    [
        ({}, "exactly one of speedup, max_loss and pareto=True, got none"),
        ({"speedup": 2.0, "pareto": True}, "got speedup, pareto"),
        ({"speedup": 0.9}, "speedup must be above 1, got 0.9"),
        ({"max_loss": -1.0}, "max_loss must be at least 0"),
        ({"max_loss": 0.1, "rounds": 0}, "rounds must be at least 1, got 0"),
        ({"max_loss": 0.1, "labels": [1]}, "labels are for a metric"),
        ({"max_loss": 0.1, "labels": [1, 2], "metric": max}, "1 inputs and 2 labels"),
    ],
)
def test_wrong_calls(fields, message):
    with pytest.raises(AiluRusError, match=message):
        autotune(nn.Linear(1, 1), [torch.zeros(1, 3, 8, 8)], **fields)


def test_wrong_inputs():
    with pytest.raises(AiluRusError, match="inputs has none"):
        autotune(make_model(NAME), [], max_loss=0.1)
    with pytest.raises(AiluRusError, match="inputs of str need processor="):
        autotune(make_model(NAME), ["a.jpg"], max_loss=0.1)
    with pytest.raises(AiluRusError, match="a transformers model or a diffusers pipeline, got int"):
        autotune(3, ["a prompt"], max_loss=0.1)


def test_losses_by_kind_of_output():
    logits = torch.tensor([[[[0.0, 1.0]], [[1.0, 0.0]]]])
    assert agreement.loss(SimpleNamespace(logits=logits), SimpleNamespace(logits=logits.flip(1))) == 1.0
    far, near = SimpleNamespace(predicted_depth=torch.full((1, 2, 2), 2.0)), torch.full((1, 2, 2), 1.5)
    assert agreement.loss(far, SimpleNamespace(predicted_depth=near)) == pytest.approx(0.25)
    one, other = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    assert agreement.loss(SimpleNamespace(last_hidden_state=one), SimpleNamespace(last_hidden_state=other)) == 1.0
    with pytest.raises(AiluRusError, match="holds no logits"):
        agreement.loss(SimpleNamespace(), SimpleNamespace())


def test_intervals_hold_the_statistic_and_narrow():
    values = torch.randn(200, generator=torch.Generator().manual_seed(1)).tolist()
    few, many = search.interval(values[:10]), search.interval(values)
    assert few[0] < sum(values[:10]) / 10 < few[1] and many[1] - many[0] < few[1] - few[0]
