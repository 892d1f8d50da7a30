"""Tiny pipelines that start from a picture or a video, or look at one: image to image, inpainting, edits, control."""

from types import SimpleNamespace

import diffusers
import torch
from diffusion_models import scheduler, text
from edit_unets import UNET_EDITS, mask, of
from edit_videos import VIDEOS
from every_pipeline import (
    EULER,
    LEFT_OUT,
    PICTURE,
    SIDES,
    Kind,
    changed,
    controlled,
    deep_sizes,
    deep_vae,
    float_mask,
    guided,
    klein,
    make_kind,
    masked,
    of_flow,
    photographs,
    pooled,
    qwen,
    qwen_vae,
    whole_mask,
    z_image,
)


def unpooled(batch, **more):
    """Flux's pipelines without guidance by a second call."""
    return {"prompt_embeds": text(batch), "pooled_prompt_embeds": text(batch, 9)[:, 0], **more}


def flux(*names, **more):
    return lambda batch: pooled(batch, true_cfg_scale=2.0, **of(PICTURE, batch, *names), **PICTURE, **more)


def flux_alone(*names, **more):
    return lambda batch: unpooled(batch, **of(PICTURE, batch, *names), **PICTURE, **more)


def sd3(*names, **more):
    return lambda batch: pooled(batch, guidance_scale=3.0, **of(PICTURE, batch, *names), **PICTURE, **more)


def qwen_of(*names, **more):
    return lambda batch: qwen(batch, **of(PICTURE, batch, *names), **more)


def chroma(*names, **more):
    return lambda batch: masked(batch, float_mask, **of(PICTURE, batch, *names), **PICTURE, **more)


def qwen_edit(batch):
    return qwen(batch, image=photographs(1, PICTURE)[0])


def z_of(*names, **more):
    return lambda batch: {**z_image(batch), **of(PICTURE, batch, *names), **more}


def sigma(batch):
    return {**masked(batch, whole_mask), "negative_prompt": None, "use_resolution_binning": False, **PICTURE}


def wide_flow():
    """Its latents have 16 channels."""
    torch.manual_seed(1)
    return {
        "scheduler": EULER(),
        "vae": diffusers.AutoencoderKL(**deep_sizes() | {"latent_channels": 16}, shift_factor=0.0).eval(),
    }


class Pictures:
    """In place of a processor of pictures and words."""

    image_processor = None


def of_qwen():
    return {"scheduler": EULER(), "vae": qwen_vae()}


# Flux's latents, and those of a picture beside them.
CONTROL = {"in_channels": 32, "out_channels": 16}
EDITS = {
    **UNET_EDITS,
    # Flux
    "Flux img2img": Kind("FluxImg2ImgPipeline", flux("image", strength=0.6), of_flow, "Flux"),
    "Flux inpaint": Kind("FluxInpaintPipeline", flux("image", "mask_image", strength=0.6), of_flow, "Flux"),
    "Flux Fill": Kind(
        "FluxFillPipeline",
        flux_alone("image", "mask_image"),
        of_flow,
        "Flux",
        {"in_channels": 16 + 16 + 256, "out_channels": 16},
    ),
    "Flux Control": Kind("FluxControlPipeline", flux_alone("control_image"), of_flow, "Flux", CONTROL),
    "Flux Control img2img": Kind(
        "FluxControlImg2ImgPipeline",
        flux_alone("image", "control_image", strength=0.6),
        of_flow,
        "Flux",
        CONTROL,
    ),
    "Flux Control inpaint": Kind(
        "FluxControlInpaintPipeline",
        flux_alone("image", "control_image", "mask_image", strength=0.6),
        of_flow,
        "Flux",
        CONTROL,
    ),
    "Flux Kontext": Kind("FluxKontextPipeline", flux("image", max_area=128 * 192, _auto_resize=False), of_flow, "Flux"),
    "Flux Kontext inpaint": Kind(
        "FluxKontextInpaintPipeline",
        flux("image", "mask_image", max_area=128 * 192, _auto_resize=False, strength=0.6),
        of_flow,
        "Flux",
    ),
    "Flux ControlNet img2img": Kind(
        "FluxControlNetImg2ImgPipeline",
        flux_alone("image", "control_image", strength=0.6),
        lambda: controlled("Flux ControlNet"),
        "Flux",
    ),
    "Flux ControlNet inpaint": Kind(
        "FluxControlNetInpaintPipeline",
        flux_alone("image", "control_image", "mask_image", strength=0.6),
        lambda: controlled("Flux ControlNet"),
        "Flux",
    ),
    # Flux.2
    "Flux.2 Klein references": Kind(
        "Flux2KleinPipeline", lambda batch: guided(batch, image=photographs(1, PICTURE), **PICTURE), klein, "Flux.2"
    ),
    "Flux.2 references": Kind(
        "Flux2Pipeline",
        lambda batch: {"prompt_embeds": text(batch), "image": photographs(1, PICTURE), **PICTURE},
        klein,
        "Flux.2",
        {"guidance_embeds": True},
    ),
    "Flux.2 Klein inpaint": Kind(
        "Flux2KleinInpaintPipeline",
        lambda batch: guided(batch, **of(PICTURE, batch, "image", "mask_image"), strength=0.6, **PICTURE),
        klein,
        "Flux.2",
    ),
    "Flux.2 Klein KV": Kind(
        "Flux2KleinKVPipeline",
        lambda batch: {"prompt_embeds": text(batch), "image": photographs(1, PICTURE), **PICTURE},
        klein,
        "Flux.2",
    ),
    # Qwen-Image
    "Qwen img2img": Kind("QwenImageImg2ImgPipeline", qwen_of("image", strength=0.6), of_qwen, "Qwen-Image"),
    "Qwen inpaint": Kind(
        "QwenImageInpaintPipeline", qwen_of("image", "mask_image", strength=0.6), of_qwen, "Qwen-Image"
    ),
    "Qwen Edit": Kind("QwenImageEditPipeline", qwen_edit, of_qwen, "Qwen-Image"),
    "Qwen Edit Plus": Kind(
        "QwenImageEditPlusPipeline", lambda batch: qwen(batch, image=photographs(2, PICTURE)), of_qwen, "Qwen-Image"
    ),
    "Qwen Edit 2511": Kind(
        "QwenImageEditPlusPipeline",
        lambda batch: qwen(batch, image=photographs(2, PICTURE)),
        of_qwen,
        "Qwen-Image",
        {"zero_cond_t": True},
    ),
    "Qwen Edit inpaint": Kind(
        "QwenImageEditInpaintPipeline",
        lambda batch: {**qwen_edit(batch), "mask_image": mask(1, PICTURE), "strength": 0.6},
        of_qwen,
        "Qwen-Image",
    ),
    "Qwen Layered": Kind(
        "QwenImageLayeredPipeline",
        lambda batch: {**qwen_edit(batch), "layers": 2, "height": LEFT_OUT, "width": LEFT_OUT},
        of_qwen,
        "Qwen-Image",
        {"use_layer3d_rope": True, "use_additional_t_cond": True},
    ),
    "Qwen ControlNet inpaint": Kind(
        "QwenImageControlNetInpaintPipeline",
        qwen_of("control_image", "control_mask"),
        lambda: {**of_qwen(), "controlnet": changed("Qwen ControlNet", {"extra_condition_channels": 4})},
        "Qwen-Image",
    ),
    # SD3, Chroma, PixArt, Z-Image, LongCat
    "SD3 img2img": Kind("StableDiffusion3Img2ImgPipeline", sd3("image", strength=0.6), of_flow, "SD3"),
    "SD3 inpaint": Kind(
        "StableDiffusion3InpaintPipeline",
        sd3("image", "mask_image", strength=0.6),
        wide_flow,
        "SD3",
        {"in_channels": 16, "out_channels": 16},
    ),
    "SD3 ControlNet inpaint": Kind(
        "StableDiffusion3ControlNetInpaintingPipeline",
        sd3("control_image", "control_mask"),
        lambda: {**of_flow(), "controlnet": changed("SD3 ControlNet", {"extra_conditioning_channels": 1})},
        "SD3",
    ),
    "SD3 PAG": Kind(
        "StableDiffusion3PAGPipeline",
        sd3(pag_scale=3.0),
        lambda: {**of_flow(), "pag_applied_layers": "blocks.1"},
        "SD3",
    ),
    "Chroma img2img": Kind("ChromaImg2ImgPipeline", chroma("image", strength=0.6), of_flow, "Chroma"),
    "PixArt Sigma": Kind(
        "PixArtSigmaPipeline",
        sigma,
        lambda: {"scheduler": scheduler(), "vae": deep_vae()},
        "PixArt",
    ),
    "PixArt Sigma PAG": Kind(
        "PixArtSigmaPAGPipeline",
        sigma,
        lambda: {"scheduler": scheduler(), "vae": deep_vae(), "pag_applied_layers": "blocks.1"},
        "PixArt",
    ),
    "LongCat edit": Kind(
        "LongCatImageEditPipeline",
        lambda batch: {
            "image": photographs(1, PICTURE)[0],
            "prompt_embeds": text(batch),
            "negative_prompt_embeds": text(batch, 9),
        },
        lambda: {**wide_flow(), "text_processor": Pictures()},
        "LongCat-Image",
    ),
    "Z-Image img2img": Kind("ZImageImg2ImgPipeline", z_of("image", strength=0.6), of_flow, "Z-Image"),
    "Z-Image Omni": Kind(
        "ZImageOmniPipeline",
        lambda batch: {
            **z_image(batch),
            "prompt_embeds": list(text(batch)),
            "negative_prompt_embeds": list(text(batch)),
        },
        of_flow,
        "Z-Image",
    ),
    "Z-Image inpaint": Kind("ZImageInpaintPipeline", z_of("image", "mask_image", strength=0.6), of_flow, "Z-Image"),
}


def make_edit(name):
    """The pipeline of a kind, with what stands in for text encoders that look at pictures."""
    pipe = make_kind({**EDITS, **VIDEOS}[name], name)
    if isinstance(pipe, diffusers.HunyuanVideoImageToVideoPipeline):
        pipe.encode_prompt = lambda prompt_embeds, pooled_prompt_embeds, prompt_attention_mask, **_: (
            prompt_embeds,
            pooled_prompt_embeds,
            prompt_attention_mask,
        )
    if isinstance(pipe, diffusers.LongCatImageEditPipeline):
        ids = torch.cartesian_prod(torch.zeros(1), torch.arange(5.0), torch.arange(5.0))[:5]
        pipe.encode_prompt = lambda prompt_embeds, **_: (prompt_embeds, ids)
    if isinstance(pipe, diffusers.Kandinsky5I2IPipeline):
        pipe.resolutions = [(SIDES["width"], SIDES["height"])]
    if isinstance(pipe, diffusers.QwenImageLayeredPipeline):
        pipe.text_encoder = SimpleNamespace(dtype=torch.float32)
        pipe.get_image_caption = lambda *_, **__: "a"
    return pipe
