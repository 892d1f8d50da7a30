"""autotune leaves a model and a pipeline as it found them, and measures a model as it predicts, not as it trains."""

import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusion_models import make_pipeline
from models import images_for, make_model

from ailurus_hf import (
    AiluRusConfig,
    AiluRusDiffusionConfig,
    AiluRusError,
    AiluRusModelForImageClassification,
    ailurus_status,
    apply_ailurus,
    autotune,
    remove_ailurus,
)
from ailurus_hf.evaluation import agreement, search

NAME = "Dinov2ForImageClassification"
CANDIDATES = [AiluRusConfig(cluster_location=1, keep_ratio=keep) for keep in (0.5, 0.7)]
ENDS = ("done", "interrupted", "failed")


def run_to(end, monkeypatch, *args, **kwargs):
    """autotune to its end, or broken off after a few runs."""
    if end == "done":
        return autotune(*args, **kwargs)
    run, left = search.Measuring._run, [4]

    def breaks_off(self, candidate, index):
        left[0] -= 1
        if left[0] < 0:
            # In the middle of a turn, with a candidate on.
            with search.ailurus_enabled(self.subject.target, None if candidate is None else candidate.config):
                raise KeyboardInterrupt if end == "interrupted" else RuntimeError("out of luck")
        return run(self, candidate, index)

    monkeypatch.setattr(search.Measuring, "_run", breaks_off)
    if end == "interrupted":
        assert autotune(*args, **kwargs).interrupted
        return None
    with pytest.raises(RuntimeError, match="out of luck"):
        autotune(*args, **kwargs)
    return None


@pytest.mark.parametrize("end", ENDS)
def test_modes_and_saved_settings_of_a_model(end, monkeypatch):
    model = make_model(NAME)
    apply_ailurus(model, keep_ratio=0.25)
    settings = dict(model.config.ailurus_config)
    remove_ailurus(model)
    model.config.ailurus_config = settings  # as a model that was loaded from a folder saved with settings
    model.train()
    model.dinov2.embeddings.eval()
    modes = [module.training for module in model.modules()]
    inputs = list(images_for(NAME, batch=3).split(1))
    run_to(end, monkeypatch, model, inputs, max_loss=1.0, candidates=CANDIDATES, rounds=1, progress=False)
    assert [module.training for module in model.modules()] == modes
    assert model.config.ailurus_config == settings
    assert not ailurus_status(model).active


def test_a_model_that_trains_is_measured_as_it_predicts():
    """Dropout would be a loss of settings that change nothing."""
    model = make_model(NAME)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.9
    same = AiluRusConfig(cluster_location=1, keep_ratio=1.0)

    def logit(output, label):
        return output.logits[0, 0].item()

    inputs = list(images_for(NAME, batch=2).split(1))
    tuned = autotune(
        model.train(), inputs, pareto=True, metric=logit, candidates=[same], rounds=1, progress=False
    )  # fmt: skip
    assert tuned.rows[0].loss == 0.0


def prompts():
    words = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))
    return [{"prompt_embeds": words, "negative_prompt_embeds": 0 * words}]


@pytest.mark.parametrize("end", ENDS)
def test_a_pipeline(end, monkeypatch):
    pipe = make_pipeline(StableDiffusionPipeline)
    pipe.set_progress_bar_config(desc="mine", disable=True)
    apply_ailurus(pipe, keep_ratio=0.5, min_tokens=12)
    settings = pipe.unet.config["ailurus_config"]
    remove_ailurus(pipe)
    pipe.unet._internal_dict = type(pipe.unet._internal_dict)({**pipe.unet.config, "ailurus_config": settings})
    pipe.scheduler.set_timesteps(7)
    scheduler, state = pipe.scheduler, copy.deepcopy(vars(pipe.scheduler))
    config = dict(pipe.config)
    generate = {"num_inference_steps": 2, "height": 16, "width": 16}
    candidates = [AiluRusDiffusionConfig(keep_ratio=ratio, min_tokens=12) for ratio in (0.9, 0.25)]
    run_to(
        end, monkeypatch, pipe, prompts(), max_loss=1.0, generate=generate, candidates=candidates, rounds=1,
        progress=False,
    )  # fmt: skip
    assert pipe.scheduler is scheduler
    assert torch.equal(scheduler.timesteps, state["timesteps"])
    assert scheduler.num_inference_steps == state["num_inference_steps"]
    assert dict(pipe.config) == config
    assert pipe._progress_bar_config == {"desc": "mine", "disable": True}
    assert pipe.unet.config["ailurus_config"] == settings
    assert not ailurus_status(pipe).active


def test_files_that_are_not_what_is_asked_for(tmp_path):
    pipe = make_pipeline(StableDiffusionPipeline)
    generate = {"num_inference_steps": 2, "height": 16, "width": 16}
    candidates = [AiluRusDiffusionConfig(keep_ratio=0.5, min_tokens=12)]
    autotune(
        pipe, prompts(), max_loss=1.0, generate=generate, candidates=candidates, rounds=1, progress=False
    ).save(tmp_path / "tuned.json")  # fmt: skip
    model = make_model(NAME)
    with pytest.raises(AiluRusError, match="is a AiluRusDiffusionConfig, and no AiluRusConfig"):
        apply_ailurus(model, tmp_path / "tuned.json")
    with pytest.raises(AiluRusError, match=r"missing\.json cannot be read"):
        apply_ailurus(model, tmp_path / "missing.json")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(AiluRusError, match=r"missing\.json cannot be read"):
        AiluRusModelForImageClassification.from_pretrained(
            tmp_path / "model", ailurus_config=str(tmp_path / "missing.json")
        )
    assert not ailurus_status(model).active


# Of every kind of output one model.
KINDS = {
    "Dinov2ForImageClassification": "labels",
    "YOLOS": "objects",
    "EoMT": "labels",
    "DepthAnything": "depth",
    "Dinov2Backbone": "features",
}


@pytest.mark.parametrize("name", KINDS)
def test_models_of_every_kind_of_output(name):
    inputs = list(images_for(name, batch=2).split(1))
    tuned = autotune(make_model(name), inputs, pareto=True, candidates=CANDIDATES, rounds=1, progress=False)
    assert tuned.loss_means == agreement.MEANING[KINDS[name]]
    assert all(row.loss >= 0 for row in tuned.rows)


def test_a_model_trains_after_it():
    """BEiT keeps a table by its window's size for all models of the process."""
    model = make_model("BeitModel")
    inputs = list(images_for("BeitModel", batch=2).split(1))
    autotune(model, inputs, max_loss=1.0, candidates=CANDIDATES, rounds=1, progress=False)
    twin = make_model("BeitModel").train()
    twin(inputs[0]).last_hidden_state.square().mean().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in twin.parameters())
