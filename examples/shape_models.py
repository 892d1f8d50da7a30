"""The networks of small text-to-image models for the pictures of shape_scenes.py, and the card of what was trained.

One is made as Stable Diffusion, the other as SD3.

Used by train_text_to_image.py.
"""

import json
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from shape_scenes import COLORS, GROUNDS, PATTERNS, SHAPES, SIDE, WORDS
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TEXT_TOKENS = 16
GUIDANCE = 3.0


def make_tokenizer() -> CLIPTokenizer:
    """A CLIPTokenizer in which each of WORDS is one token, of the same number wherever it is made."""
    special = ["<|startoftext|>", "<|endoftext|>"]
    # Left to the trainer, they would get numbers in the order of a hash, and decide which of two equal pairs is merged.
    last_letters = sorted({f"{word[-1]}</w>" for word in WORDS})
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=special[1]))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator(
        WORDS,
        trainers.BpeTrainer(special_tokens=[*special, *last_letters], end_of_word_suffix="</w>", min_frequency=1),
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


def make_text_encoder(
    tokenizer: CLIPTokenizer, width: int, pooled: bool = False
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """pooled: one that makes a vector of the whole caption, too, which SD3 wants."""
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
    return CLIPTextModelWithProjection(config) if pooled else CLIPTextModel(config)


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


def make_sd3(layers: int, width: int, text_width: int) -> SD3Transformer2DModel:
    """As SD3's, on 16 x 16 tokens of 2 x 2 latents. Two text encoders of that width, no third.

    What modulates and the last projection start at zero, as in DiT (Peebles and Xie 2023): each block is the identity.
    """
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 4,
        pos_embed_max_size=SIDE // 8,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        caption_projection_dim=width,
        joint_attention_dim=2 * text_width,
        pooled_projection_dim=2 * text_width,
        qk_norm="rms_norm",
    )
    modulating = [m.linear for block in transformer.transformer_blocks for m in (block.norm1, block.norm1_context)]
    with torch.no_grad():
        for linear in (*modulating, transformer.norm_out.linear, transformer.proj_out):
            linear.weight.zero_()
            linear.bias.zero_()
    return transformer


def pipeline_options(pipe: Any) -> dict[str, Any]:
    """What a pipeline has to be told beside the prompt: SD3's to leave no tokens free for a third text encoder."""
    return {"max_sequence_length": 0} if hasattr(pipe, "text_encoder_3") else {}


def make_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=1.0)


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
    """sizes: of the networks, in millions of parameters. result: what `export` measured, as in metrics.json."""
    is_sd3 = "transformer" in sizes
    parts = ", ".join(f"{name} {size:.2f} M" for name, size in sizes.items())
    spent = ", ".join(f"{name} {s['steps']} steps in {s['minutes']} minutes" for name, s in result["training"].items())
    kind, command = ("StableDiffusion3Pipeline", " --network sd3") if is_sd3 else ("StableDiffusionPipeline", "")
    name, more = ("shapes-sd3", ", max_sequence_length=0") if is_sd3 else ("shapes", "")
    parts_given = ", text_encoder_3=None, tokenizer_3=None" if is_sd3 else ""
    tokens = "16 x 16 tokens" if is_sd3 else "32 x 32, 16 x 16 and 8 x 8 tokens"
    steps = "steps" if is_sd3 else "DDIM steps"
    control = ", with a ControlNet on edges" if "control" in result else ""
    return f"""# A small Stable Diffusion{" 3" * is_sd3} for captioned shapes

Text to image at {SIDE} x {SIDE} pixels{control}, in the format of diffusers; parameters: {parts}, in
half precision. It knows {len(SHAPES)} shapes in {len(COLORS)} colors on {len(GROUNDS)} x {len(PATTERNS)} grounds and is
made for tests and measurements of token reduction: its self-attention runs on {tokens}.

```python
from diffusers import {kind}

pipe = {kind}.from_pretrained("{name}"{parts_given})
prompt = "large red circle left and small blue ring right on pink stripes"
pipe(prompt, num_inference_steps=20, guidance_scale={GUIDANCE}{more})
```

## How good it is

{result["pictures"]} scenes that it was not trained on, 20 {steps}, guidance {GUIDANCE}, float32, read by the
rules of examples/shape_scenes.py (color at its position, shape and size of each thing, color of the ground):

{scores_table(result)}

## How it was made

    python examples/train_text_to_image.py{command}

on pictures that the script makes, from nothing: {spent}. The weights are under this project's license.
"""


def scores_table(result: dict[str, Any]) -> str:
    """A row a way of asking: by text, or by text and edges."""
    rows = ["| | facts shown | captions shown whole | edges (F1 within 2 pixels) |", "| --- | --- | --- | --- |"]
    for key, name in {"text": "text", "control": "text and edges"}.items():
        if key in result:
            scores = result[key]
            edges = f"{scores['edges']:.3f}" if "edges" in scores else ""
            rows.append(f"| {name} | {scores['facts']:.1%} | {scores['whole captions']:.1%} | {edges} |")
    return "\n".join(rows)
