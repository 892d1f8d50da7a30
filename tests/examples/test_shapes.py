"""The shipped text-to-image models load as diffusers' own, show what is asked for, and lose little reduced."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

from ailurus_hf import AiluRusDiffusionConfig, ailurus_enabled
from ailurus_hf.presets import TRANSFORMER_PRESETS
from benchmarks.diffusion.diffusion_quality import Scenes, load
from benchmarks.methods.diffusion import switch_on
from examples.shape_scenes import read

ASSETS = Path(__file__).parents[2] / "examples/assets"


@pytest.fixture(scope="module")
def task():
    pytest.importorskip("skimage")
    return Scenes(load(ASSETS / "shapes-sd3", controlled=False), prompts=4, seeds=1, steps=10)


@pytest.fixture(scope="module")
def plain(task):
    return pictures(task)


@pytest.fixture(scope="module")
def of_random(task, plain):
    """What representatives drawn at random score."""
    off = switch_on("random representatives 0.25", task.pipe, 256)
    scores, _ = task.scores(pictures(task), plain)
    off()
    return scores


def pictures(task):
    with torch.inference_mode():
        return task.pictures()


def test_it_is_diffusers_own(task):
    assert type(task.pipe) is StableDiffusion3Pipeline
    assert {part.dtype for part in (task.pipe.transformer, task.pipe.vae, task.pipe.text_encoder)} == {torch.float32}


def test_it_shows_what_is_asked_for(task, plain):
    assert task.scores(plain, plain)[0]["facts"] > 0.5


@pytest.mark.parametrize("name", TRANSFORMER_PRESETS)
def test_presets_are_nearer_than_random_representatives(task, plain, of_random, name):
    config = AiluRusDiffusionConfig.preset(name, network="transformer", min_tokens=256)
    with ailurus_enabled(task.pipe, config):
        scores, _ = task.scores(pictures(task), plain)
    assert scores["psnr_of_all"] > of_random["psnr_of_all"] + 3
    assert torch.equal(pictures(task), plain)


def test_the_stable_diffusion_shows_the_grounds():
    pytest.importorskip("skimage")
    task = Scenes(load(ASSETS / "shapes", controlled=False), prompts=8, seeds=1, steps=8)
    assert type(task.pipe) is StableDiffusionPipeline
    made = pictures(task)
    # Shapes it knows less well; of four grounds chance would show two of eight.
    grounds = [read(picture, scene)["ground"] for picture, (scene, _) in zip(made, task.jobs, strict=True)]
    assert sum(grounds) >= 5
    with ailurus_enabled(task.pipe, AiluRusDiffusionConfig.preset("faithful", min_tokens=256)):
        scores, _ = task.scores(pictures(task), made)
    assert scores["psnr"] > 30
