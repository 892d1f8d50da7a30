"""The tiny pipeline of every supported network that diffusers has one for, and generations with them."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusion_models import NETWORKS, make_network, make_vae, scheduler, sharpen
from PIL import Image
from tiny_network import LATENTS, text, text_mask

EULER = FlowMatchEulerDiscreteScheduler
# Rows and columns of pictures and videos: at a VAE that makes eight pixels one, and at one that makes two one.
SIDES, SMALL = {"height": 64, "width": 96}, {"height": 2 * LATENTS[0], "width": 2 * LATENTS[1]}
PICTURE = {"height": 128, "width": 192}
# In place of an input that a pipeline does not take.
LEFT_OUT = object()


@dataclass(frozen=True)
class Kind:
    """pipeline: its class, by name. inputs: what it is called with, for a batch. parts: those beside the network.

    network: in NETWORKS; None: of the same name as the kind. fields: of its config, where the pipeline needs others.
    """

    pipeline: str
    inputs: Callable[[int], dict]
    parts: Callable[[], dict] = lambda: {"scheduler": EULER()}
    network: str | None = None
    fields: dict | None = None


def texts(batch):
    return {"prompt_embeds": text(batch), "negative_prompt_embeds": text(batch, 9)}


def guided(batch, **more):
    return {**texts(batch), "guidance_scale": 3.0, **more}


def masked(batch, mask=text_mask, **more):
    masks = {f"{part}prompt_attention_mask": mask(batch) for part in ("", "negative_")}
    return guided(batch, **masks, **more)


def whole_mask(batch):
    return torch.ones(batch, 5)


def float_mask(batch):
    """As Chroma's pipeline makes it."""
    return text_mask(batch).float()


def pooled(batch, **more):
    return {
        **texts(batch),
        **{f"{part}pooled_prompt_embeds": text(batch, 9)[:, 0] for part in ("", "negative_")},
        **more,
    }


def qwen(batch, **more):
    masks = {f"{part}prompt_embeds_mask": text_mask(batch) for part in ("", "negative_")}
    return {**texts(batch), **masks, "true_cfg_scale": 3.0, **PICTURE, **more}


def z_image(batch):
    """Texts of several lengths, which the network pads to a multiple of 32."""
    longer = lambda all_of_them: [each.repeat(1 + 7 * (n % 2), 1) for n, each in enumerate(all_of_them)]  # noqa: E731
    return {name: longer(each) for name, each in texts(batch).items()} | {"guidance_scale": 3.0, **PICTURE}


def longcat(batch):
    """Words, as it takes no embeddings without them."""
    return {"prompt": ["a"] * batch, "negative_prompt": ["b"] * batch, "enable_prompt_rewrite": False, **PICTURE}


def kandinsky(batch):
    inputs = {"guidance_scale": 3.0, "num_frames": 9, **SIDES}
    for part, seed in (("", 1), ("negative_", 9)):
        inputs |= {f"{part}prompt_embeds_qwen": text(batch, seed), f"{part}prompt_embeds_clip": text(batch, seed)[:, 0]}
        inputs[f"{part}prompt_cu_seqlens"] = 5 * torch.arange(batch + 1)
    return inputs


def picture(batch, sides=SMALL):
    sizes = sides["height"], sides["width"]
    return torch.rand(batch, 3, *sizes, generator=torch.Generator().manual_seed(3))


def deep_sizes():
    torch.manual_seed(1)
    sizes = {"block_out_channels": (8,) * 4, "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return sizes | blocks


def deep_vae():
    """One that makes eight pixels one. It gives the mean alone: pipelines draw around it without their generators."""
    vae = diffusers.AutoencoderKL(**deep_sizes(), shift_factor=0.0).eval()
    with torch.no_grad():
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = -30
    return vae


def klein():
    return {"scheduler": EULER(), "vae": diffusers.AutoencoderKLFlux2(**deep_sizes()).eval()}


def cogvideo():
    return {"scheduler": diffusers.CogVideoXDDIMScheduler()}


def consisid():
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        temporal_compression_ratio=4,
    )
    return cogvideo() | {"vae": vae.eval()}


def unets():
    return {"scheduler": scheduler(), "vae": make_vae()}


def image_encoder():
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=224,
        patch_size=112,
        projection_dim=16,
    )
    extractor = CLIPImageProcessor()
    return {"image_encoder": CLIPVisionModelWithProjection(config).eval(), "feature_extractor": extractor}


def photographs(batch, sides=SMALL):
    """As PIL images, which pipelines scale to the size that their encoder takes."""
    return [Image.fromarray((255 * each).byte().permute(1, 2, 0).numpy()) for each in picture(batch, sides)]


def sparse_conditions():
    """One for each frame: a frame without any is blank to a SparseControlNetModel, and rounding alone would say which
    of its tokens are alike."""
    return {"conditioning_frames": photographs(2), "controlnet_frame_indices": [0, 1]}


def svd():
    steps = diffusers.EulerDiscreteScheduler(prediction_type="v_prediction", use_karras_sigmas=True)
    return {"scheduler": steps, "vae": make_vae(), **image_encoder()}


def qwen_vae():
    torch.manual_seed(1)
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    ).eval()


def of_stable_diffusion():
    return {**unets(), "requires_safety_checker": False}


def of_flow():
    return {"scheduler": EULER(), "vae": deep_vae()}


def controlled(control, parts=of_flow, **more):
    """Parts with a ControlNet."""
    return {**parts(), "controlnet": make_network(control), **more}


KINDS = {
    "UNet": Kind("StableDiffusionPipeline", lambda batch: guided(batch, **SMALL), of_stable_diffusion),
    "SDXL UNet": Kind(
        "StableDiffusionXLPipeline",
        lambda batch: pooled(batch, guidance_scale=3.0, **SMALL),
        lambda: {**unets(), "add_watermarker": False},
    ),
    "ControlNet": Kind(
        "StableDiffusionControlNetPipeline",
        lambda batch: guided(batch, image=picture(batch), **SMALL),
        lambda: controlled("ControlNet", of_stable_diffusion),
        "UNet",
    ),
    "UNetMotionModel": Kind("AnimateDiffPipeline", lambda batch: guided(batch, num_frames=2, **SMALL), unets),
    "I2VGenXL": Kind(
        "I2VGenXLPipeline",
        lambda batch: guided(batch, image=photographs(batch), num_frames=2, **SMALL),
        lambda: {**unets(), **image_encoder()},
    ),
    "PixArt": Kind(
        "PixArtAlphaPipeline",
        lambda batch: {
            **masked(batch, whole_mask),
            "negative_prompt": None,
            "use_resolution_binning": False,
            **PICTURE,
        },
        lambda: {"scheduler": scheduler(), "vae": deep_vae()},
    ),
    "SD3": Kind("StableDiffusion3Pipeline", lambda batch: pooled(batch, **PICTURE)),
    "SD3.5": Kind("StableDiffusion3Pipeline", lambda batch: pooled(batch, **PICTURE)),
    "Flux": Kind("FluxPipeline", lambda batch: pooled(batch, true_cfg_scale=2.0, **PICTURE)),
    "Chroma": Kind("ChromaPipeline", lambda batch: masked(batch, float_mask, **PICTURE)),
    "Flux.2": Kind("Flux2KleinPipeline", lambda batch: guided(batch, **PICTURE), klein),
    "Bria": Kind(
        "BriaPipeline", lambda batch: guided(batch, **PICTURE), lambda: {"scheduler": EULER(), "vae": deep_vae()}
    ),
    "LongCat-Image": Kind("LongCatImagePipeline", longcat),
    "Ovis-Image": Kind("OvisImagePipeline", lambda batch: guided(batch, negative_prompt=None, **PICTURE)),
    "Qwen-Image": Kind("QwenImagePipeline", qwen),
    "CogView3-Plus": Kind(
        "CogView3PlusPipeline", lambda batch: guided(batch, **PICTURE), lambda: {"scheduler": scheduler()}
    ),
    "Lumina 2": Kind("Lumina2Pipeline", lambda batch: masked(batch, **PICTURE)),
    "Z-Image": Kind("ZImagePipeline", z_image),
    "Wan": Kind("WanPipeline", lambda batch: guided(batch, num_frames=9, **SIDES)),
    "SkyReels-V2": Kind(
        "SkyReelsV2Pipeline",
        lambda batch: guided(batch, num_frames=9, **SIDES),
        lambda: {"scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)},
    ),
    "LTX-Video": Kind("LTXPipeline", lambda batch: masked(batch, num_frames=17, height=128, width=192)),
    "HunyuanVideo": Kind(
        "HunyuanVideoPipeline",
        lambda batch: pooled(
            batch,
            true_cfg_scale=3.0,
            num_frames=9,
            prompt_attention_mask=text_mask(batch),
            negative_prompt_attention_mask=text_mask(batch),
            **SIDES,
        ),
    ),
    "CogVideoX": Kind("CogVideoXPipeline", lambda batch: guided(batch, num_frames=9, **SIDES), cogvideo),
    "ConsisID": Kind(
        "ConsisIDPipeline",
        lambda batch: guided(batch, num_frames=9, image=picture(batch, SIDES), **SIDES),
        consisid,
        fields={"in_channels": 8},
    ),
    "Kandinsky 5": Kind("Kandinsky5T2VPipeline", kandinsky),
    "DiT": Kind(
        "DiTPipeline",
        lambda batch: {"class_labels": list(range(batch))},
        lambda: {"scheduler": DDIMScheduler(), "vae": make_vae()},
        fields={"num_embeds_ada_norm": 1000, "out_channels": 4},
    ),
    "Stable Video Diffusion": Kind(
        "StableVideoDiffusionPipeline",
        lambda batch: {"image": photographs(batch), "num_frames": 2, **SMALL},
        svd,
        fields={"in_channels": 8},
    ),
    "UNet3D": Kind("TextToVideoSDPipeline", lambda batch: guided(batch, num_frames=2, **SMALL), unets),
    "ControlNet Union": Kind(
        "StableDiffusionXLControlNetUnionPipeline",
        lambda batch: pooled(batch, control_image=[picture(batch)], control_mode=[1], guidance_scale=3.0, **SMALL),
        lambda: controlled("ControlNet Union", unets, add_watermarker=False),
        "SDXL UNet",
    ),
    "ControlNet-XS": Kind(
        "StableDiffusionControlNetXSPipeline",
        lambda batch: guided(batch, image=picture(batch), **SMALL),
        of_stable_diffusion,
    ),
    "SparseCtrl": Kind(
        "AnimateDiffSparseControlNetPipeline",
        lambda batch: guided(batch, num_frames=2, **sparse_conditions(), **SMALL),
        lambda: controlled("SparseCtrl", unets),
        "UNetMotionModel",
    ),
    "SD3 ControlNet": Kind(
        "StableDiffusion3ControlNetPipeline",
        lambda batch: pooled(batch, control_image=picture(batch, PICTURE), guidance_scale=3.0, **PICTURE),
        lambda: controlled("SD3 ControlNet"),
        "SD3",
    ),
    "Flux ControlNet": Kind(
        "FluxControlNetPipeline",
        lambda batch: pooled(batch, control_image=picture(batch, PICTURE), true_cfg_scale=2.0, **PICTURE),
        lambda: controlled("Flux ControlNet"),
        "Flux",
    ),
    "Qwen ControlNet": Kind(
        "QwenImageControlNetPipeline",
        lambda batch: qwen(batch, control_image=picture(batch, PICTURE)),
        lambda: controlled("Qwen ControlNet", lambda: {"scheduler": EULER(), "vae": qwen_vae()}),
        "Qwen-Image",
    ),
}


def make_every_pipeline(name):
    """The pipeline of a kind by its name."""
    pipe = make_kind(KINDS[name], name)
    if name == "LongCat-Image":
        # In place of its text encoder.
        pipe._encode_prompt = lambda words: text(len(words), 1 if words[0] == "a" else 9)
    return pipe


def make_kind(kind, name):
    """The pipeline of a kind. name: of its network, where the kind has none."""
    name = kind.network or name
    network = make_network(name) if kind.fields is None else changed(name, kind.fields)
    made = getattr(diffusers, kind.pipeline)
    parameters = inspect.signature(made.__init__).parameters
    names = list(parameters)[1:]
    held = "transformer" if "transformer" in names else "unet"
    empty = {each: None for each in names if parameters[each].default is inspect.Parameter.empty}
    pipe = made(**{**empty, **kind.parts(), held: network})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def changed(name, fields):
    """A network with other fields in its config."""
    network = NETWORKS[name].make()
    config = {field: value for field, value in network.config.items() if not field.startswith("_")}
    torch.manual_seed(0)
    return sharpen(type(network)(**{**config, **fields}))


def generate_any(pipe, name, seed=0, batch=1, steps=3, **kwargs):
    """Latents of pictures or videos, of seeds that follow one another."""
    # DiT's gives pictures alone.
    output_type = "np" if name == "DiT" else "latent"
    return generate_kind(pipe, KINDS[name], seed, batch, steps, output_type=output_type, **kwargs)


def generate_kind(pipe, kind, seed=0, batch=1, steps=3, **kwargs):
    """As generate_any, with the inputs of a kind; those that are LEFT_OUT are not given."""
    # For what a VAE gives.
    torch.manual_seed(seed)
    generators = [torch.Generator().manual_seed(seed + n) for n in range(batch)]
    # Some take a list for several videos, also where it holds one.
    generator = generators if batch > 1 else generators[0]
    inputs = {"num_inference_steps": steps, "generator": generator, "output_type": "latent", "return_dict": False}
    inputs = {**inputs, **kind.inputs(batch), **kwargs}
    made = pipe(**{name: value for name, value in inputs.items() if value is not LEFT_OUT})
    # Some give latents in their output whatever return_dict says.
    return torch.as_tensor(made if torch.is_tensor(made) else made[0])
