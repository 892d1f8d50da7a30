"""The shipped text-to-image transformer loads as diffusers' own, shows what is asked for, and costs little reduced."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from ailurus_hf import AiluRusDiffusionConfig, ailurus_enabled
from ailurus_hf.presets import TRANSFORMER_PRESETS
from ailurus_hf.video.measures import psnr
from benchmarks.diffusion.diffusion_quality import Scenes, image_of, load
from benchmarks.methods.diffusion import switch_on
from examples.shape_scenes import read

FOLDER = "examples/assets/shapes-sd3"


@pytest.fixture(scope="module")
def task():
    pytest.importorskip("skimage")
    return Scenes(load(FOLDER, controlled=False), prompts=4, seeds=1, steps=10)


@pytest.fixture(scope="module")
def plain(task):
    return pictures(task)


def pictures(task):
    with torch.inference_mode():
        return task.pictures()


def nearness(made, plain):
    """PSNR of all pixels, in dB."""
    return psnr(*([image_of(picture) for picture in each] for each in (made, plain)))


def test_it_is_diffusers_own(task):
    assert type(task.pipe) is StableDiffusion3Pipeline
    assert {part.dtype for part in (task.pipe.transformer, task.pipe.vae, task.pipe.text_encoder)} == {torch.float32}


def test_it_shows_what_is_asked_for(task, plain):
    shown = [
        fact for (scene, _), picture in zip(task.jobs, plain, strict=True) for fact in read(picture, scene).values()
    ]
    assert sum(shown) / len(shown) > 0.5


@pytest.mark.parametrize("name", TRANSFORMER_PRESETS)
def test_presets_are_nearer_than_random_representatives(task, plain, name):
    config = AiluRusDiffusionConfig.preset(name, network="transformer", min_tokens=256)
    with ailurus_enabled(task.pipe, config):
        near = nearness(pictures(task), plain)
    off = switch_on("random representatives 0.25", task.pipe, 256)
    far = nearness(pictures(task), plain)
    off()
    assert near > far + 3
    assert torch.equal(pictures(task), plain)
