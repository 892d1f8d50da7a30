"""The networks of a small Stable Diffusion for the pictures of shape_scenes.py, and the card of what was trained.

Used by train_text_to_image.py.
"""

import json
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from shape_scenes import COLORS, GROUNDS, PATTERNS, SHAPES, SIDE, WORDS
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TEXT_TOKENS = 16
GUIDANCE = 3.0


def make_tokenizer() -> CLIPTokenizer:
    """A CLIPTokenizer in which each of WORDS is one token."""
    special = ["<|startoftext|>", "<|endoftext|>"]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=special[1]))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator(
        WORDS, trainers.BpeTrainer(special_tokens=special, end_of_word_suffix="</w>", min_frequency=1)
    )
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=TEXT_TOKENS)


def make_vae(width: int) -> AutoencoderKL:
    """Pictures to latents a quarter of their sides."""
    vae = AutoencoderKL(
        block_out_channels=(width, 2 * width, 2 * width),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIDE,
    )
    # Little noise on the latents from the start: with that of random weights nothing comes through for a long while.
    with torch.no_grad():
        vae.quant_conv.weight[4:].zero_()
        vae.quant_conv.bias[4:].fill_(-6)
    return vae


def make_text_encoder(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def make_unet(widths: tuple[int, ...], text_width: int) -> UNet2DConditionModel:
    """As Stable Diffusion's, with attention at every resolution: of 32 x 32, 16 x 16 and 8 x 8 tokens."""
    return UNet2DConditionModel(
        sample_size=SIDE // 4,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * len(widths),
        up_block_types=("CrossAttnUpBlock2D",) * len(widths),
        attention_head_dim=tuple(width // 32 for width in widths),
        cross_attention_dim=text_width,
        norm_num_groups=8,
        use_linear_projection=True,
    )


def make_scheduler() -> DDIMScheduler:
    """The last timestep is pure noise, or grounds would all be of medium brightness (Lin et al. 2024)."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )


def model_card(sizes: dict[str, float], result: dict[str, Any]) -> str:
    parts = ", ".join(f"{name} {size:.2f} M" for name, size in sizes.items())
    spent = ", ".join(f"{name} {s['steps']} steps in {s['minutes']} minutes" for name, s in result["training"].items())
    text, control = result["text"], result["control"]
    return f"""# A small Stable Diffusion for captioned shapes

Text to image at {SIDE} x {SIDE} pixels, with a ControlNet on edges, in the format of diffusers; parameters: {parts}, in
half precision. It knows {len(SHAPES)} shapes in {len(COLORS)} colors on {len(GROUNDS)} x {len(PATTERNS)} grounds and is
made for tests and measurements of token reduction: its self-attention runs on 32 x 32, 16 x 16 and 8 x 8 tokens.

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("shapes")
prompt = "large red circle left and small blue ring right on pink stripes"
pipe(prompt, num_inference_steps=20, guidance_scale={GUIDANCE})
```

## How good it is

{result["pictures"]} scenes that it was not trained on, 20 DDIM steps, guidance {GUIDANCE}, float32, read by the
rules of examples/shape_scenes.py (color at its position, shape and size of each thing, color of the ground):

| | facts shown | captions shown whole | edges (F1 within 2 pixels) |
| --- | --- | --- | --- |
| text | {text["facts"]:.1%} | {text["whole captions"]:.1%} | |
| text and edges | {control["facts"]:.1%} | {control["whole captions"]:.1%} | {control["edges"]:.3f} |

## How it was made

    python examples/train_text_to_image.py

on pictures that the script makes, from nothing: {spent}. The weights are under this project's license.
"""
