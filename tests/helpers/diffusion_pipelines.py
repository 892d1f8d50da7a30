"""Tiny diffusers pipelines of every kind with the inputs that each takes, and what their status counts."""

import torch
from diffusers import (
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusion_models import LATENTS, make_controlnet, make_pipeline, sharpen, text

from ailurus_hf import ailurus_status

PICTURE = torch.rand(1, 3, 2 * LATENTS[0], 2 * LATENTS[1], generator=torch.Generator().manual_seed(3))


class Tiles(StableDiffusionPipeline):
    """Calls its UNet for each tile of a picture in turn, in each of two steps."""

    def __call__(self, tiles):
        self._guidance_scale = 1.0
        self.scheduler.set_timesteps(2)
        with torch.no_grad():
            return [[self.unet(x, t, text(1)).sample for x in tiles] for t in self.scheduler.timesteps]


def text_to_image():
    return make_pipeline(StableDiffusionPipeline), {}


def sdxl():
    return make_pipeline(StableDiffusionXLPipeline, "SDXL UNet"), {}


def image_to_image():
    return make_pipeline(StableDiffusionImg2ImgPipeline), {"image": PICTURE, "strength": 0.6, "size": None}


def inpaint():
    return make_pipeline(StableDiffusionInpaintPipeline), {
        "image": PICTURE,
        "mask_image": (PICTURE[:, :1] > 0.5).float(),
    }


def controlnet():
    torch.manual_seed(0)
    pipe = make_pipeline(StableDiffusionControlNetPipeline, controlnet=sharpen(make_controlnet()))
    return pipe, {"image": PICTURE, "size": None}


PIPELINES = {f.__name__: f for f in (text_to_image, sdxl, image_to_image, inpaint, controlnet)}


def clusterings(pipe):
    """How often each of the UNet's stacks of a resolution clustered, all as often; the largest resolution first."""
    found = {}
    for location in ailurus_status(pipe).locations:
        if location.where.startswith("unet"):
            found.setdefault(location.num_tokens, set()).add(location.clusterings)
    return [number for tokens in sorted(found, reverse=True) for (number,) in [found[tokens]]]


def ours(caplog):
    return [record for record in caplog.records if record.name.startswith("ailurus_hf")]
