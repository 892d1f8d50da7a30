"""Tiny pipelines of UNets that start from a picture or look at one."""

import diffusers
import torch
from diffusion_models import make_network, make_vae, text
from every_pipeline import (
    SMALL,
    Kind,
    changed,
    controlled,
    guided,
    image_encoder,
    of_stable_diffusion,
    photographs,
    picture,
    pooled,
    unets,
)


def mask(batch, sides):
    """The right half."""
    white = torch.zeros(batch, 1, sides["height"], sides["width"])
    white[..., sides["width"] // 2 :] = 1
    return white


def of(sides, batch, *names):
    """The same picture as so many inputs; "mask_image" and "control_mask": a mask."""
    return {name: mask(batch, sides) if "mask" in name else picture(batch, sides) for name in names}


def small(*names, **more):
    return lambda batch: guided(batch, **of(SMALL, batch, *names), **more)


def xl(*names, **more):
    return lambda batch: pooled(batch, guidance_scale=3.0, **of(SMALL, batch, *names), **more)


def vae_of_upscaler():
    vae = make_vae()
    vae.register_to_config(scaling_factor=0.08333)
    return vae


def of_xl():
    return {**unets(), "add_watermarker": False}


def union(batch):
    return {"control_image": [picture(batch)], "control_mode": [1]}


def controlled_xl():
    """With a ControlNet that is made as SDXL's UNet is."""
    unet = make_network("SDXL UNet").config
    named = ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")
    named += ("transformer_layers_per_block", "use_linear_projection", "attention_head_dim", "down_block_types")
    return {**of_xl(), "controlnet": changed("ControlNet", {name: unet[name] for name in named})}


def with_adapter():
    torch.manual_seed(1)
    adapter = diffusers.T2IAdapter(channels=[16, 32], num_res_blocks=1, downscale_factor=2)
    return {**of_stable_diffusion(), "adapter": adapter.eval()}


UNET_EDITS = {
    "SD img2img": Kind("StableDiffusionImg2ImgPipeline", small("image", strength=0.6), of_stable_diffusion, "UNet"),
    "SD inpaint": Kind(
        "StableDiffusionInpaintPipeline",
        small("image", "mask_image", strength=0.6, **SMALL),
        of_stable_diffusion,
        "UNet",
    ),
    "SD inpaint 9": Kind(
        "StableDiffusionInpaintPipeline",
        small("image", "mask_image", **SMALL),
        of_stable_diffusion,
        "UNet",
        {"in_channels": 9},
    ),
    "SD InstructPix2Pix": Kind(
        "StableDiffusionInstructPix2PixPipeline", small("image"), of_stable_diffusion, "UNet", {"in_channels": 8}
    ),
    "SD upscale": Kind(
        "StableDiffusionUpscalePipeline",
        lambda batch: guided(batch, image=picture(batch, {"height": 8, "width": 12})),
        lambda: {**unets(), "vae": vae_of_upscaler(), "low_res_scheduler": diffusers.DDPMScheduler()},
        "UNet",
        {"in_channels": 7, "num_class_embeds": 1000},
    ),
    "SD depth2img": Kind(
        "StableDiffusionDepth2ImgPipeline",
        lambda batch: guided(batch, **of(SMALL, batch, "image"), depth_map=picture(batch)[:, 0], strength=0.6),
        unets,
        "UNet",
        {"in_channels": 5},
    ),
    "SD variation": Kind(
        "StableDiffusionImageVariationPipeline",
        lambda batch: {"image": photographs(batch), "guidance_scale": 3.0, **SMALL},
        lambda: {**of_stable_diffusion(), **image_encoder()},
        "UNet",
    ),
    "LCM img2img": Kind(
        "LatentConsistencyModelImg2ImgPipeline",
        lambda batch: {"prompt_embeds": text(batch), **of(SMALL, batch, "image"), "original_inference_steps": 20},
        lambda: {**of_stable_diffusion(), "scheduler": diffusers.LCMScheduler()},
        "UNet",
        {"time_cond_proj_dim": 8},
    ),
    "SD ControlNet img2img": Kind(
        "StableDiffusionControlNetImg2ImgPipeline",
        small("image", "control_image", strength=0.6, **SMALL),
        lambda: controlled("ControlNet", of_stable_diffusion),
        "UNet",
    ),
    "SD ControlNet inpaint": Kind(
        "StableDiffusionControlNetInpaintPipeline",
        small("image", "control_image", "mask_image", strength=0.6, **SMALL),
        lambda: controlled("ControlNet", of_stable_diffusion),
        "UNet",
    ),
    "SDXL img2img": Kind("StableDiffusionXLImg2ImgPipeline", xl("image", strength=0.6), of_xl, "SDXL UNet"),
    "SDXL refiner": Kind("StableDiffusionXLImg2ImgPipeline", xl("image", denoising_start=0.5), of_xl, "SDXL UNet"),
    "SDXL inpaint": Kind(
        "StableDiffusionXLInpaintPipeline", xl("image", "mask_image", strength=0.6, **SMALL), of_xl, "SDXL UNet"
    ),
    "SDXL InstructPix2Pix": Kind(
        "StableDiffusionXLInstructPix2PixPipeline", xl("image", **SMALL), of_xl, "SDXL UNet", {"in_channels": 8}
    ),
    "SDXL ControlNet Union img2img": Kind(
        "StableDiffusionXLControlNetUnionImg2ImgPipeline",
        lambda batch: pooled(
            batch,
            image=picture(batch),
            control_image=[picture(batch)],
            control_mode=[1],
            strength=0.6,
            guidance_scale=3.0,
            **SMALL,
        ),
        lambda: controlled("ControlNet Union", of_xl),
        "SDXL UNet",
    ),
    "SD T2I-Adapter": Kind("StableDiffusionAdapterPipeline", small("image", **SMALL), with_adapter, "UNet"),
    "SDXL ControlNet": Kind("StableDiffusionXLControlNetPipeline", xl("image", **SMALL), controlled_xl, "SDXL UNet"),
    "SDXL ControlNet img2img": Kind(
        "StableDiffusionXLControlNetImg2ImgPipeline",
        xl("image", "control_image", strength=0.6, **SMALL),
        controlled_xl,
        "SDXL UNet",
    ),
    "SDXL ControlNet inpaint": Kind(
        "StableDiffusionXLControlNetInpaintPipeline",
        xl("image", "control_image", "mask_image", strength=0.6, **SMALL),
        controlled_xl,
        "SDXL UNet",
    ),
    "SDXL ControlNet Union inpaint": Kind(
        "StableDiffusionXLControlNetUnionInpaintPipeline",
        lambda batch: {**xl("image", "mask_image", strength=0.6, **SMALL)(batch), **union(batch)},
        lambda: controlled("ControlNet Union", of_xl),
        "SDXL UNet",
    ),
}
