"""Tiny diffusion networks and pipelines made from configs, and inputs for them."""

from functools import partial

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    MotionAdapter,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNetMotionModel,
    WanTransformer3DModel,
)
from newer_networks import NEWER, at_zero, unrotated
from other_unets import OTHER_CONTROLS, SDXL, UNET, UP, VIDEO_UNETS, control_conditions, sdxl_conditions
from tiny_network import LATENTS, TEXT, WAN, Network, packed, text
from torch import nn

# Every grid of the tiny networks is larger than this but the one of the last level of odd latents.
SETTINGS = {"keep_ratio": 0.25, "min_tokens": 12, "cluster_location": 0}

PATCHES = {
    "sample_size": 16,
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "patch_size": 2,
    "norm_num_groups": 4,
}


JOINT = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "joint_attention_dim": TEXT,
    "pooled_projection_dim": TEXT,
}


def motion_unet():
    unet = UNet2DConditionModel(**UNET, **UP, attention_head_dim=2)
    adapter = MotionAdapter(
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        motion_mid_block_layers_per_block=1,
    )
    return UNetMotionModel.from_unet2d(unet, adapter)


def make_controlnet(**fields):
    fields = {**{name: value for name, value in UNET.items() if name != "sample_size"}, **fields}
    return ControlNetModel(**{"attention_head_dim": 2, "conditioning_embedding_out_channels": (4, 8), **fields})


def make_sd3(**fields):
    return SD3Transformer2DModel(
        sample_size=16,
        pos_embed_max_size=32,
        in_channels=4,
        out_channels=4,
        caption_projection_dim=16,
        **{**JOINT, "qk_norm": "rms_norm", **fields},
    )


def joint_conditions(batch):
    return {"encoder_hidden_states": text(batch), "pooled_projections": text(batch)[:, 0]}


NETWORKS = {
    "UNet": Network(lambda: UNet2DConditionModel(**UNET, **UP, attention_head_dim=2)),
    "SDXL UNet": Network(
        lambda: UNet2DConditionModel(**SDXL, up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")),
        sdxl_conditions,
        grids=[(4, 6)],
    ),
    "ControlNet": Network(lambda: make_controlnet(), control_conditions),
    "UNetMotionModel": Network(
        motion_unet, lambda batch: {"encoder_hidden_states": text(batch).repeat_interleave(2, 0)}, (4, 2, *LATENTS)
    ),
    "PixArt": Network(
        lambda: PixArtTransformer2DModel(
            **PATCHES, cross_attention_dim=16, caption_channels=TEXT, use_additional_conditions=False
        ),
        lambda batch: {"encoder_hidden_states": text(batch), "added_cond_kwargs": {}},
        (4, 16, 24),
        maps=False,
        grids=[(8, 12)],
    ),
    "DiT": Network(
        lambda: DiTTransformer2DModel(**PATCHES, num_embeds_ada_norm=10),
        lambda batch: {"class_labels": torch.arange(batch) % 3},
        (4, 16, 16),
        maps=False,
        grids=[(8, 8)],
    ),
    "SD3": Network(make_sd3, joint_conditions, (4, 16, 24), maps=False, grids=[(8, 12)]),
    "SD3.5": Network(
        lambda: make_sd3(dual_attention_layers=(0,)), joint_conditions, (4, 16, 24), maps=False, grids=[(8, 12)]
    ),
    "Flux": Network(
        lambda: FluxTransformer2DModel(**JOINT, num_single_layers=2, in_channels=16, axes_dims_rope=(2, 2, 4)),
        lambda batch: {**joint_conditions(batch), "txt_ids": torch.zeros(5, 3)},
        (4, 16, 24),
        maps=False,
        grids=[(8, 12)],
        no_positions=at_zero,
    ),
    "Wan": Network(
        lambda: WanTransformer3DModel(**WAN),
        shape=(4, 3, 8, 12),
        maps=False,
        grids=[(3, 4, 6)],
        no_positions=partial(unrotated, "rope"),
        small=((4, 3, 2, 2), 4),
    ),
    **VIDEO_UNETS,
    **OTHER_CONTROLS,
    **NEWER,
}


def sharpen(network):
    """Weights large enough that attention is far from uniform and tokens matter; zero convolutions are not zero."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1 and parameter.abs().max() == 0:
                parameter.normal_(std=0.2)
            if name.endswith(("attn1.to_q.weight", "attn1.to_k.weight")):
                parameter.mul_(6)
            if name.endswith("attn2.to_v.weight"):
                parameter.mul_(12)
            # Joint attention normalizes queries and keys, and opens the gates of its layers by the timestep.
            if ".attn" in name and name.endswith(
                ("norm_q.weight", "norm_k.weight", "added_q.weight", "added_k.weight")
            ):
                parameter.mul_(3)
            if name.endswith(("norm1.linear.weight", ".norm.linear.weight")) and "transformer_blocks" in name:
                parameter.mul_(3)
            if "stream_modulation" in name:
                parameter.mul_(3)
    return network.eval()


def make_network(name):
    torch.manual_seed(0)
    return sharpen(NETWORKS[name].make())


def latents(shape, batch=2, seed=0):
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


def predict(network, name, sample, timestep=5, **kwargs):
    """The network's output as one tensor."""
    batch = sample.shape[0]
    timesteps = timestep if torch.is_tensor(timestep) else torch.full((batch,), timestep)
    conditions = {**NETWORKS[name].conditions(batch), **kwargs}
    conditions = {
        k: v.to(sample.dtype) if hasattr(v, "is_floating_point") and v.is_floating_point() else v
        for k, v in conditions.items()
    }
    if name == "ControlNet":
        conditions["controlnet_cond"] = nn.functional.interpolate(
            conditions["controlnet_cond"], [2 * side for side in sample.shape[-2:]]
        )
    if name == "Flux":
        sample, conditions["img_ids"] = packed(sample)
    args, conditions = NETWORKS[name].call(sample, {"timestep": timesteps, **conditions})
    with torch.no_grad():
        out = network(*args, **conditions, return_dict=False)
    return torch.cat(list(flattened(out)), 1)


def flattened(out):
    """Every tensor of an output, as Tensor[B, ...]; of a list of images, one."""
    if torch.is_tensor(out):
        yield out.flatten(1)
    elif isinstance(out, list) and out[0].ndim == 4 and out[0].shape[1] == 1:
        yield torch.stack(out).flatten(1)
    else:
        for each in out:
            yield from flattened(each)


def make_vae():
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
    ).eval()


def scheduler():
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDIMScheduler(**betas, clip_sample=False, steps_offset=1)


def make_pipeline(kind, network="UNet", **parts):
    """A diffusers pipeline without text encoders: prompts are given as embeddings."""
    names = dict.fromkeys(["text_encoder", "tokenizer", "safety_checker", "feature_extractor"])
    if network == "SDXL UNet":
        names = dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
        extra = {"add_watermarker": False, "force_zeros_for_empty_prompt": False}
    else:
        extra = {"requires_safety_checker": False}
    pipe = kind(vae=make_vae(), unet=make_network(network), scheduler=scheduler(), **names, **extra, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, steps=4, seed=0, batch=1, size=LATENTS, **kwargs):
    """Images in latent space, Tensor[B, 4, H, W], from embeddings of a prompt and of none."""
    prompts = {"prompt_embeds": text(batch), "negative_prompt_embeds": text(batch, seed=9)}
    if hasattr(pipe, "text_encoder_2"):
        prompts |= {"pooled_prompt_embeds": text(batch)[:, 0], "negative_pooled_prompt_embeds": text(batch, 9)[:, 0]}
    sides = {} if size is None else {"height": 2 * size[0], "width": 2 * size[1]}
    generator = torch.Generator().manual_seed(seed)
    return pipe(
        **{**prompts, **sides, "num_inference_steps": steps, "generator": generator, "output_type": "latent", **kwargs}
    ).images
