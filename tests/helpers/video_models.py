"""A tiny ControlVideo pipeline made from configs, and control frames for it."""

import torch
from diffusers.models.controlnets import MultiControlNetModel
from diffusion_models import TEXT, make_controlnet, make_network, make_vae, scheduler, sharpen
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ailurus_hf.pipelines import ControlVideoPipeline

# In pixels; the tiny VAE halves them, so that latents are 8 by 12.
SIZE = (16, 24)
SETTINGS = {"keep_ratio": 0.25, "min_tokens": 12}


def make_tokenizer():
    letters = [chr(number) for number in (*range(33, 127), *range(161, 173), *range(174, 324))]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=16)


def make_text_encoder():
    torch.manual_seed(2)
    sizes = {"hidden_size": TEXT, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=514, max_position_embeddings=16, bos_token_id=512, eos_token_id=513, **sizes)
    return CLIPTextModel(config).eval()


def make_control(seed=0):
    torch.manual_seed(seed)
    return sharpen(make_controlnet())


def make_pipeline(controlnet=None):
    parts = {"vae": make_vae(), "text_encoder": make_text_encoder(), "tokenizer": make_tokenizer()}
    pipe = ControlVideoPipeline(
        **parts, unet=make_network("UNet"), controlnet=controlnet or make_control(), scheduler=scheduler()
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_controls(number):
    return MultiControlNetModel([make_control(seed) for seed in range(number)])


def clip(count=4, size=SIZE, seed=3):
    """Control frames, Tensor[F, 3, H, W]: still noise with a square that moves."""
    frames = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(seed)).repeat(count, 1, 1, 1)
    for number in range(count):
        frames[number, :, 2:8, number : number + 6] = 1
    return frames


def video(pipe, frames=None, seed=0, **arguments):
    """Latents of a video, Tensor[F, 4, H, W]."""
    given = {"num_inference_steps": 3, "output_type": "latent", "guidance_scale": 4.0, **arguments}
    generator = torch.Generator().manual_seed(seed)
    return pipe("a cat", clip() if frames is None else frames, generator=generator, **given).frames


F, LATENTS = 4, (4, SIZE[0] // 2, SIZE[1] // 2)


def noise(count=F, seed=5):
    """Start noise that differs from frame to frame, so that it matters which frames see each other."""
    return torch.randn(count, *LATENTS, generator=torch.Generator().manual_seed(seed))


def close(got, want, tolerance=1e-3):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * want.abs().max().item())


def differ(one, other):
    return (one - other).abs().max() > 1e-3 * one.abs().max()
