"""Tiny networks of the families after Flux and Wan: of pictures, of videos, and their ControlNets."""

from functools import partial

import torch
from diffusers import (
    BriaTransformer2DModel,
    ChromaTransformer2DModel,
    CogVideoXTransformer3DModel,
    CogView3PlusTransformer2DModel,
    ConsisIDTransformer3DModel,
    Flux2Transformer2DModel,
    FluxControlNetModel,
    HunyuanVideoTransformer3DModel,
    Kandinsky5Transformer3DModel,
    LongCatImageTransformer2DModel,
    LTXVideoTransformer3DModel,
    Lumina2Transformer2DModel,
    OvisImageTransformer2DModel,
    QwenImageControlNetModel,
    QwenImageTransformer2DModel,
    SD3ControlNetModel,
    SkyReelsV2Transformer3DModel,
    ZImageTransformer2DModel,
)
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from tiny_network import TEXT, WAN, Network, no_positions, packed, text, text_mask

HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
JOINT = {**HEADS, "joint_attention_dim": TEXT}
COGVIDEO = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": TEXT,
    "max_text_seq_length": 5,
    "use_rotary_positional_embeddings": True,
}
VIDEO = {"shape": (4, 3, 8, 12), "maps": False, "grids": [(3, 4, 6)], "small": ((4, 3, 2, 2), 4)}
PICTURE = {"shape": (4, 16, 24), "maps": False, "grids": [(8, 12)]}


def pooled(batch):
    return {"encoder_hidden_states": text(batch), "pooled_projections": text(batch)[:, 0]}


def masked(batch):
    return {"encoder_hidden_states": text(batch), "encoder_attention_mask": text_mask(batch)}


def unrotated(path, network):
    """Its rotary embedding turns by nothing."""

    def flat(module, args, output):
        if torch.is_tensor(output):
            return torch.eye(2).expand_as(output)
        cos, sin = output
        return (torch.ones_like(cos), torch.ones_like(sin) if cos.is_complex() else torch.zeros_like(sin))

    network.get_submodule(path).register_forward_hook(flat)


def at_zero(network):
    network.pos_embed.register_forward_pre_hook(lambda module, args: (args[0] * 0,))


def flat_tables(network):
    """The same where it is looked up in tables."""
    rope = network.rope_embedder
    if rope.freqs_cis is None:
        rope.freqs_cis = rope.precompute_freqs_cis(rope.axes_dims, rope.axes_lens, theta=rope.theta)
    rope.freqs_cis = [torch.ones_like(each) for each in rope.freqs_cis]


# Pictures


def call_chroma(sample, conditions):
    tokens, ids = packed(sample)
    mask = torch.cat([text_mask(len(sample)), torch.ones(tokens.shape[:2])], 1).to(sample.dtype)
    return (tokens,), {"img_ids": ids, "txt_ids": torch.zeros(5, 3), "attention_mask": mask, **conditions}


def call_flux2(sample, conditions):
    tokens, ids = packed(sample)
    places = {"img_ids": torch.cat([ids, ids[:, :1] * 0], 1)}
    places["txt_ids"] = torch.cartesian_prod(*[torch.zeros(1)] * 3, torch.arange(5.0))
    # Of 1 and less, as its pipelines give it.
    return (tokens,), {**places, **conditions, "timestep": conditions["timestep"] / 1000}


def call_qwen(sample, conditions):
    shapes = [[(1, *(side // 2 for side in sample.shape[-2:]))]] * len(sample)
    mask = text_mask(len(sample)).bool()
    return (packed(sample)[0],), {"img_shapes": shapes, "encoder_hidden_states_mask": mask, **conditions}


def call_z_image(sample, conditions):
    conditions = dict(conditions)
    texts = conditions.pop("encoder_hidden_states")
    # Texts are padded to a multiple of 32 tokens: those of the second image to more of them.
    texts = [each if number % 2 == 0 else each.repeat(8, 1) for number, each in enumerate(texts)]
    return (list(sample.unsqueeze(2)),), {
        "t": conditions.pop("timestep").to(sample.dtype),
        "cap_feats": texts,
        **conditions,
    }


# Videos


def call_ltx(sample, conditions):
    sides = dict(zip(("num_frames", "height", "width"), sample.shape[-3:]))
    tokens = sample.flatten(2).transpose(1, 2)
    return (tokens,), {**sides, "rope_interpolation_scale": (0.32, 32, 32), **conditions}


def call_cogvideo(sample, conditions):
    frames, height, width = sample.shape[-3:]
    cells = torch.cartesian_prod(*(torch.arange(float(side)) for side in (frames, height // 2, width // 2)))
    parts = [get_1d_rotary_pos_embed(size, cells[:, axis], use_real=True) for axis, size in enumerate((4, 6, 6))]
    rotary = tuple(torch.cat(part, 1) for part in zip(*parts))
    return (sample.transpose(1, 2),), {"image_rotary_emb": rotary, **conditions}


def call_kandinsky(sample, conditions):
    frames, height, width = sample.shape[-3:]
    places = [torch.arange(side) for side in (frames, height // 2, width // 2)]
    return (sample.permute(0, 2, 3, 4, 1),), {"visual_rope_pos": places, "text_rope_pos": torch.arange(5), **conditions}


def unplaced(network):
    """Its pipeline gives the embedding."""
    network.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "image_rotary_emb": None}), with_kwargs=True
    )


# ControlNets


def with_condition(call, sample, conditions):
    """What controls is here made of the latents, so that it repeats where they do."""
    args, conditions = call(sample, conditions)
    condition = args[0].flip(1) if args[0].ndim == 4 else args[0].flip(2)
    return args, {"controlnet_cond": condition, **conditions}


def call_flux(sample, conditions):
    tokens, ids = packed(sample)
    return (tokens,), {"img_ids": ids, "txt_ids": torch.zeros(5, 3), **conditions}


NEWER = {
    "Chroma": Network(
        lambda: ChromaTransformer2DModel(
            **JOINT,
            num_layers=2,
            num_single_layers=2,
            in_channels=16,
            axes_dims_rope=(2, 2, 4),
            approximator_num_channels=16,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
        call=call_chroma,
        no_positions=at_zero,
        **PICTURE,
    ),
    "Flux.2": Network(
        lambda: Flux2Transformer2DModel(
            **JOINT,
            num_layers=2,
            num_single_layers=2,
            in_channels=16,
            axes_dims_rope=(2, 2, 2, 2),
            timestep_guidance_channels=8,
            guidance_embeds=False,
        ),
        call=call_flux2,
        no_positions=at_zero,
        **PICTURE,
    ),
    **{
        name: Network(
            partial(made, **JOINT, num_layers=2, num_single_layers=2, in_channels=channels, axes_dims_rope=(2, 2, 4)),
            call=call_flux,
            no_positions=at_zero,
            **{**PICTURE, "shape": (channels // 4, 16, 24), "small": ((channels // 4, 4, 4), 4)},
        )
        for name, made, channels in (
            ("Bria", BriaTransformer2DModel, 16),
            # Its pipeline makes latents of 16 channels, whatever the network.
            ("LongCat-Image", LongCatImageTransformer2DModel, 64),
            ("Ovis-Image", partial(OvisImageTransformer2DModel, out_channels=16), 16),
        )
    },
    "Qwen-Image": Network(
        lambda: QwenImageTransformer2DModel(
            **JOINT, num_layers=2, in_channels=16, out_channels=4, axes_dims_rope=(2, 2, 4)
        ),
        call=call_qwen,
        no_positions=partial(unrotated, "pos_embed"),
        **PICTURE,
    ),
    "CogView3-Plus": Network(
        lambda: CogView3PlusTransformer2DModel(
            in_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            out_channels=4,
            text_embed_dim=TEXT,
            time_embed_dim=8,
            condition_dim=4,
            pos_embed_max_size=32,
            sample_size=16,
        ),
        lambda batch: {
            "encoder_hidden_states": text(batch),
            **{name: torch.full((batch, 2), 64.0) for name in ("original_size", "target_size", "crop_coords")},
        },
        no_positions=lambda network: network.patch_embed.pos_embed.zero_(),
        **PICTURE,
    ),
    "Lumina 2": Network(
        lambda: Lumina2Transformer2DModel(
            sample_size=16,
            in_channels=4,
            hidden_size=16,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=8,
            axes_dim_rope=(2, 2, 4),
            axes_lens=(32, 32, 32),
            cap_feat_dim=TEXT,
        ),
        masked,
        no_positions=flat_tables,
        **PICTURE,
    ),
    "Z-Image": Network(
        lambda: ZImageTransformer2DModel(
            in_channels=4,
            dim=16,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=TEXT,
            axes_dims=[2, 2, 4],
            axes_lens=[128, 32, 32],
        ),
        call=call_z_image,
        no_positions=flat_tables,
        **PICTURE,
    ),
    "SkyReels-V2": Network(
        lambda: SkyReelsV2Transformer3DModel(**WAN),
        no_positions=partial(unrotated, "rope"),
        **VIDEO,
    ),
    "LTX-Video": Network(
        lambda: LTXVideoTransformer3DModel(
            **HEADS, num_layers=2, in_channels=4, out_channels=4, cross_attention_dim=16, caption_channels=TEXT
        ),
        masked,
        call=call_ltx,
        no_positions=partial(unrotated, "rope"),
        **{**VIDEO, "shape": (4, 3, 4, 6), "small": ((4, 3, 2, 2), 2)},
    ),
    "HunyuanVideo": Network(
        lambda: HunyuanVideoTransformer3DModel(
            **HEADS,
            num_layers=2,
            num_single_layers=1,
            num_refiner_layers=1,
            in_channels=4,
            out_channels=4,
            guidance_embeds=False,
            text_embed_dim=TEXT,
            pooled_projection_dim=TEXT,
            rope_axes_dim=(2, 2, 4),
        ),
        lambda batch: {**masked(batch), **pooled(batch)},
        no_positions=partial(unrotated, "rope"),
        **VIDEO,
    ),
    "CogVideoX": Network(
        lambda: CogVideoXTransformer3DModel(**COGVIDEO),
        call=call_cogvideo,
        no_positions=unplaced,
        **VIDEO,
    ),
    "ConsisID": Network(
        lambda: ConsisIDTransformer3DModel(**COGVIDEO, is_train_face=False),
        call=call_cogvideo,
        no_positions=unplaced,
        **VIDEO,
    ),
    "Kandinsky 5": Network(
        lambda: Kandinsky5Transformer3DModel(
            in_visual_dim=4,
            in_text_dim=TEXT,
            in_text_dim2=TEXT,
            time_dim=16,
            out_visual_dim=4,
            model_dim=16,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=(2, 2, 4),
        ),
        pooled,
        call=call_kandinsky,
        no_positions=partial(unrotated, "visual_rope_embeddings"),
        **VIDEO,
    ),
    "SD3 ControlNet": Network(
        lambda: SD3ControlNetModel(
            **JOINT,
            num_layers=2,
            pooled_projection_dim=TEXT,
            caption_projection_dim=16,
            sample_size=16,
            pos_embed_max_size=32,
            in_channels=4,
            out_channels=4,
        ),
        pooled,
        call=partial(with_condition, lambda sample, conditions: ((sample,), conditions)),
        no_positions=no_positions,
        each=True,
        **PICTURE,
    ),
    "Flux ControlNet": Network(
        lambda: FluxControlNetModel(
            **JOINT,
            num_layers=2,
            num_single_layers=1,
            pooled_projection_dim=TEXT,
            in_channels=16,
            axes_dims_rope=(2, 2, 4),
        ),
        pooled,
        call=partial(with_condition, call_flux),
        no_positions=at_zero,
        each=True,
        **PICTURE,
    ),
    "Qwen ControlNet": Network(
        lambda: QwenImageControlNetModel(
            **JOINT, num_layers=2, in_channels=16, out_channels=4, axes_dims_rope=(2, 2, 4)
        ),
        call=partial(with_condition, call_qwen),
        no_positions=partial(unrotated, "pos_embed"),
        each=True,
        **PICTURE,
    ),
}
