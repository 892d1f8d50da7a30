"""Tiny diffusers pipelines around transformers, without text encoders, and generations with them."""

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PixArtAlphaPipeline,
    StableDiffusion3Pipeline,
    WanPipeline,
)
from diffusion_models import make_network, make_vae, scheduler, text

ENCODERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
# The class of each network's pipeline, and how many text encoders it has.
KINDS = {
    "SD3": (StableDiffusion3Pipeline, 3),
    "SD3.5": (StableDiffusion3Pipeline, 3),
    "Flux": (FluxPipeline, 2),
    "PixArt": (PixArtAlphaPipeline, 1),
    "Wan": (WanPipeline, 1),
}


def make_transformer_pipeline(name):
    """The pipeline of a network by its name in NETWORKS."""
    kind, encoders = KINDS[name]
    steps = scheduler() if name == "PixArt" else FlowMatchEulerDiscreteScheduler()
    vae = None if name == "Wan" else make_vae()
    pipe = kind(scheduler=steps, vae=vae, transformer=make_network(name), **dict.fromkeys(ENCODERS[: 2 * encoders]))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate_with_guidance(pipe, seed=0, steps=4, **kwargs):
    """Pictures in latent space, or videos of Wan: from embeddings of a prompt and of none."""
    inputs = {"prompt_embeds": text(1), "negative_prompt_embeds": text(1, 9)}
    inputs |= {"num_inference_steps": steps, "output_type": "latent", "height": 32, "width": 48}
    if isinstance(pipe, WanPipeline):
        inputs |= {"height": 64, "width": 96, "num_frames": 9}
    elif isinstance(pipe, PixArtAlphaPipeline):
        mask = torch.ones(1, 5)
        inputs |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
        inputs |= {"prompt": None, "negative_prompt": None, "use_resolution_binning": False}
    else:
        inputs |= {"pooled_prompt_embeds": text(1)[:, 0], "negative_pooled_prompt_embeds": text(1, 9)[:, 0]}
    if isinstance(pipe, FluxPipeline):
        inputs["true_cfg_scale"] = 2.0
    made = pipe(**{**inputs, **kwargs}, generator=torch.Generator().manual_seed(seed))
    return made.frames if isinstance(pipe, WanPipeline) else made.images
