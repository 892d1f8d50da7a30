"""Tiny UNets of videos, and the ControlNets of UNets beside ControlNetModel."""

import torch
from diffusers import (
    ControlNetUnionModel,
    I2VGenXLUNet,
    SparseControlNetModel,
    UNet2DConditionModel,
    UNet3DConditionModel,
    UNetControlNetXSModel,
    UNetSpatioTemporalConditionModel,
)
from tiny_network import LATENTS, TEXT, Network, text
from torch import nn

UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "cross_attention_dim": TEXT,
    "norm_num_groups": 4,
}
UP = {"up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D")}
# As SDXL: linear projections, several blocks a stack, no attention at full size, size and crop as conditions.
SDXL = {
    **UNET,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "transformer_layers_per_block": (1, 3),
    "use_linear_projection": True,
    "attention_head_dim": (2, 4),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 8 * 6 + TEXT,
}


def sdxl_conditions(batch):
    added = {"text_embeds": text(batch)[:, 0], "time_ids": torch.arange(6.0).expand(batch, -1)}
    return {"encoder_hidden_states": text(batch), "added_cond_kwargs": added}


def control_conditions(batch):
    picture = torch.rand(batch, 3, 2 * LATENTS[0], 2 * LATENTS[1], generator=torch.Generator().manual_seed(2))
    return {"encoder_hidden_states": text(batch), "controlnet_cond": picture}


def make_union():
    fields = {name: value for name, value in SDXL.items() if name != "sample_size"}
    return ControlNetUnionModel(
        in_channels=4,
        conditioning_embedding_out_channels=(4, 8),
        num_control_type=6,
        num_trans_channel=16,
        num_trans_head=2,
        num_proj_channel=16,
        **fields,
    )


def union_conditions(batch):
    picture = control_conditions(batch)["controlnet_cond"]
    return {**sdxl_conditions(batch), "controlnet_cond": [picture], "control_type_idx": [1]}


def call_union(sample, conditions):
    kinds = torch.nn.functional.one_hot(torch.ones(len(sample), dtype=torch.long), 6).to(sample.dtype)
    sides = [2 * side for side in sample.shape[-2:]]
    pictures = [nn.functional.interpolate(each.to(sample.dtype), sides) for each in conditions["controlnet_cond"]]
    return (sample,), {**conditions, "controlnet_cond": pictures, "control_type": kinds}


def make_xs():
    unet = UNet2DConditionModel(**{**UNET, "layers_per_block": 2}, **UP, attention_head_dim=2)
    fields = {"conditioning_embedding_out_channels": (4, 8)}
    return UNetControlNetXSModel.from_unet(unet, size_ratio=0.5, ctrl_optional_kwargs=fields)


def make_sparse():
    fields = {name: value for name, value in UNET.items() if name != "sample_size"}
    return SparseControlNetModel(
        **{**fields, "down_block_types": ("CrossAttnDownBlockMotion",) * 2},
        attention_head_dim=2,
        motion_num_attention_heads=2,
    )


def call_controlled(sample, conditions):
    """A picture of the size that the latents are of."""
    picture = nn.functional.interpolate(
        conditions["controlnet_cond"].to(sample.dtype), [2 * n for n in sample.shape[-2:]]
    )
    return (sample,), {**conditions, "controlnet_cond": picture}


def call_sparse(sample, conditions):
    """Its condition is of latents, and a mask says of which frames."""
    return (sample,), {
        **conditions,
        "controlnet_cond": sample.flip(1),
        "conditioning_mask": torch.ones_like(sample[:, :1]),
    }


def make_svd():
    return UNetSpatioTemporalConditionModel(
        sample_size=8,
        in_channels=4,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal",) * 2,
        up_block_types=("CrossAttnUpBlockSpatioTemporal",) * 2,
        layers_per_block=1,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        cross_attention_dim=TEXT,
        num_attention_heads=2,
        num_frames=2,
    )


def svd_conditions(batch):
    return {"encoder_hidden_states": text(batch)[:, :1], "added_time_ids": torch.arange(3.0).expand(batch, -1)}


FIELDS_3D = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock3D",) * 2,
    "up_block_types": ("CrossAttnUpBlock3D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": TEXT,
    "attention_head_dim": 2,
}


def i2vgen_conditions(batch):
    return {"encoder_hidden_states": text(batch), "fps": torch.full((batch,), 8), "image_embeddings": text(batch)[:, 0]}


def call_i2vgen(sample, conditions):
    return (sample,), {**conditions, "image_latents": sample.flip(2)}


VIDEO = (4, 2, *LATENTS)
VIDEO_UNETS = {
    "Stable Video Diffusion": Network(make_svd, svd_conditions, (2, 4, *LATENTS)),
    "UNet3D": Network(lambda: UNet3DConditionModel(**FIELDS_3D), shape=VIDEO),
    "I2VGenXL": Network(lambda: I2VGenXLUNet(**FIELDS_3D), i2vgen_conditions, VIDEO, call=call_i2vgen),
}
OTHER_CONTROLS = {
    "ControlNet Union": Network(make_union, union_conditions, grids=[(4, 6)], call=call_union),
    "ControlNet-XS": Network(make_xs, control_conditions, call=call_controlled),
    "SparseCtrl": Network(
        make_sparse,
        lambda batch: {"encoder_hidden_states": text(batch).repeat_interleave(2, 0)},
        VIDEO,
        call=call_sparse,
    ),
}
