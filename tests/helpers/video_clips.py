"""Clips and a tiny ControlVideo pipeline made by the tests."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusion_models import TEXT, UNET, UP, make_controlnet, scheduler, sharpen
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ailurus_hf.pipelines import ControlVideoPipeline


def moving_square(count: int = 12, size: tuple[int, int] = (48, 32), step: int = 2) -> list[Image.Image]:
    """A bright square that goes right over a dark ramp."""
    frames = []
    for number in range(count):
        pixels = np.repeat(np.linspace(20, 60, size[0])[None, :, None], size[1], 0).repeat(3, 2).astype(np.uint8)
        pixels[10:22, 4 + number * step : 16 + number * step] = (250, 200, 40)
        frames.append(Image.fromarray(pixels))
    return frames


def save_pipeline(folder: Path, levels: int = 2) -> None:
    """A tiny ControlVideo pipeline with random weights in folder/model, its ControlNet in folder/controlnet.

    levels: of the VAE, whose latents are 2 ** (levels - 1) times smaller than pictures; 4 for those of Stable
    Diffusion.
    """
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=8)
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=TEXT,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=8,
            bos_token_id=len(words) - 2,
            eos_token_id=len(words) - 1,
        )
    )
    unet: UNet2DConditionModel = sharpen(UNet2DConditionModel(**UNET, **UP, attention_head_dim=2))
    controlnet: ControlNetModel = sharpen(
        make_controlnet(conditioning_embedding_out_channels=(4,) * (levels - 1) + (8,))
    )
    vae = AutoencoderKL(
        block_out_channels=(8,) * levels,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    )
    pipe = ControlVideoPipeline(vae.eval(), text_encoder.eval(), tokenizer, unet, controlnet, scheduler())
    pipe.save_pretrained(folder / "model")
    controlnet.save_pretrained(folder / "controlnet")
