"""Tiny pipelines of videos that start from a picture or a video, or look at one."""

import diffusers
import torch
from every_pipeline import (
    EULER,
    LEFT_OUT,
    PICTURE,
    SIDES,
    SMALL,
    Kind,
    changed,
    cogvideo,
    consisid,
    controlled,
    guided,
    image_encoder,
    kandinsky,
    masked,
    of_flow,
    photographs,
    picture,
    pooled,
    unets,
)
from tiny_network import text_mask

STEPS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def clips(batch):
    """Nine frames each."""
    return [photographs(9, SIDES)] * batch


def with_vae(vae, **more):
    return lambda: {"scheduler": EULER(), "vae": vae(), **more}


def wan_vae():
    torch.manual_seed(1)
    return diffusers.AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()


def ltx_vae():
    torch.manual_seed(1)
    sizes = {"latent_channels": 4, "block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    return diffusers.AutoencoderKLLTXVideo(**sizes, layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5).eval()


def hunyuan_vae():
    torch.manual_seed(1)
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    ).eval()


def cogvideo_with_vae():
    return {**cogvideo(), "vae": consisid()["vae"]}


def two_experts():
    return {
        "scheduler": EULER(),
        "vae": wan_vae(),
        "expand_timesteps": False,
        "transformer_2": changed("Wan", {"in_channels": 12}),
        "boundary_ratio": 0.9,
    }


def hunyuan(batch, **more):
    masks = {f"{part}prompt_attention_mask": text_mask(batch) for part in ("", "negative_")}
    return pooled(batch, true_cfg_scale=3.0, num_frames=9, **masks, **SIDES, **more)


def diffusion_forcing(batch):
    return guided(batch, prompt=None, num_frames=9, base_num_frames=9, **SIDES)


VIDEOS = {
    "Wan I2V": Kind(
        "WanImageToVideoPipeline",
        lambda batch: guided(batch, num_frames=9, image=picture(1, SIDES), **SIDES),
        with_vae(wan_vae, expand_timesteps=False),
        "Wan",
        {"in_channels": 12},
    ),
    "Wan 2.2 I2V": Kind(
        "WanImageToVideoPipeline",
        lambda batch: guided(batch, num_frames=9, image=picture(1, SIDES), **SIDES),
        two_experts,
        "Wan",
        {"in_channels": 12},
    ),
    "Wan 2.2 5B I2V": Kind(
        "WanImageToVideoPipeline",
        lambda batch: guided(batch, num_frames=9, image=picture(1, SIDES), **SIDES),
        with_vae(wan_vae, expand_timesteps=True),
        "Wan",
    ),
    "Wan V2V": Kind(
        "WanVideoToVideoPipeline",
        lambda batch: guided(batch, video=clips(batch), strength=0.6, **SIDES),
        with_vae(wan_vae),
        "Wan",
    ),
    "Lucy Edit": Kind(
        "LucyEditPipeline",
        lambda batch: guided(batch, video=clips(batch), num_frames=9, **SIDES),
        with_vae(wan_vae, expand_timesteps=False),
        "Wan",
        {"in_channels": 8},
    ),
    "SkyReels-V2 I2V": Kind(
        "SkyReelsV2ImageToVideoPipeline",
        lambda batch: guided(batch, num_frames=9, image=photographs(1, SIDES)[0], **SIDES),
        lambda: {
            "scheduler": diffusers.UniPCMultistepScheduler(**STEPS),
            "vae": wan_vae(),
            "image_encoder": image_encoder()["image_encoder"],
            "image_processor": image_encoder()["feature_extractor"],
        },
        "SkyReels-V2",
        {"in_channels": 12, "image_dim": 16, "added_kv_proj_dim": 32},
    ),
    "SkyReels-V2 diffusion forcing": Kind(
        "SkyReelsV2DiffusionForcingPipeline",
        diffusion_forcing,
        lambda: {"scheduler": diffusers.UniPCMultistepScheduler(**STEPS), "vae": wan_vae()},
        "SkyReels-V2",
    ),
    "CogVideoX I2V": Kind(
        "CogVideoXImageToVideoPipeline",
        lambda batch: guided(batch, num_frames=9, image=picture(batch, SIDES), **SIDES),
        cogvideo_with_vae,
        "CogVideoX",
        {"in_channels": 8},
    ),
    "CogVideoX 1.5 I2V": Kind(
        "CogVideoXImageToVideoPipeline",
        lambda batch: guided(batch, num_frames=13, image=picture(batch, SIDES), **SIDES),
        cogvideo_with_vae,
        "CogVideoX",
        {"in_channels": 8, "patch_size_t": 2, "ofs_embed_dim": 8},
    ),
    "CogVideoX V2V": Kind(
        "CogVideoXVideoToVideoPipeline",
        lambda batch: guided(batch, video=clips(batch), strength=0.6, **SIDES),
        cogvideo_with_vae,
        "CogVideoX",
    ),
    "CogVideoX Fun": Kind(
        "CogVideoXFunControlPipeline",
        lambda batch: guided(batch, control_video=clips(batch), **SIDES),
        cogvideo_with_vae,
        "CogVideoX",
        {"in_channels": 8},
    ),
    "HunyuanVideo I2V": Kind(
        "HunyuanVideoImageToVideoPipeline",
        lambda batch: hunyuan(batch, image=picture(batch, SIDES)),
        with_vae(hunyuan_vae),
        "HunyuanVideo",
        {"in_channels": 9, "image_condition_type": "latent_concat"},
    ),
    "HunyuanVideo I2V, replaced": Kind(
        "HunyuanVideoImageToVideoPipeline",
        lambda batch: hunyuan(batch, image=picture(batch, SIDES)),
        with_vae(hunyuan_vae),
        "HunyuanVideo",
        {"image_condition_type": "token_replace"},
    ),
    "HunyuanVideo SkyReels I2V": Kind(
        "HunyuanSkyreelsImageToVideoPipeline",
        lambda batch: hunyuan(batch, image=picture(batch, SIDES)),
        with_vae(hunyuan_vae),
        "HunyuanVideo",
        {"in_channels": 8, "guidance_embeds": True},
    ),
    "LTX I2V": Kind(
        "LTXImageToVideoPipeline",
        lambda batch: masked(batch, image=picture(batch, PICTURE), num_frames=17, **PICTURE),
        with_vae(ltx_vae),
        "LTX-Video",
    ),
    "LTX condition": Kind(
        "LTXConditionPipeline",
        lambda batch: masked(batch, image=picture(1, PICTURE), num_frames=17, **PICTURE),
        with_vae(ltx_vae),
        "LTX-Video",
    ),
    "Kandinsky 5 I2V": Kind(
        "Kandinsky5I2VPipeline",
        lambda batch: {**kandinsky(batch), "num_frames": 21, "image": picture(batch, SIDES)},
        with_vae(hunyuan_vae),
        "Kandinsky 5",
        {"visual_cond": True},
    ),
    "Kandinsky 5 I2I": Kind(
        "Kandinsky5I2IPipeline",
        lambda batch: {**kandinsky(batch), "num_frames": LEFT_OUT, "image": picture(batch, SIDES)},
        of_flow,
        "Kandinsky 5",
        {"visual_cond": True},
    ),
    "AnimateDiff V2V": Kind(
        "AnimateDiffVideoToVideoPipeline",
        lambda batch: guided(batch, video=[photographs(2)] * batch, strength=0.6, **SMALL),
        unets,
        "UNetMotionModel",
    ),
    "AnimateDiff ControlNet": Kind(
        "AnimateDiffControlNetPipeline",
        lambda batch: guided(batch, num_frames=2, conditioning_frames=photographs(2), **SMALL),
        lambda: controlled("ControlNet", unets),
        "UNetMotionModel",
    ),
    "UNet3D V2V": Kind(
        "VideoToVideoSDPipeline",
        lambda batch: guided(batch, video=photographs(2), strength=0.6),
        unets,
        "UNet3D",
    ),
}
