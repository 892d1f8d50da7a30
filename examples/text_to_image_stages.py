"""What train_text_to_image.py trains, a stage each: its networks, its loss on a batch of scenes, and its pipeline.

Autoencoding, then Denoising (a UNet) and Controlling (its ControlNet), or Flowing (a transformer shaped as SD3's).
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from diffusers.models.attention_processor import AttnProcessor
from shape_models import make_flow_scheduler, make_scheduler, make_tokenizer
from shape_scenes import SIDE, Scene, draw, edges, random_scene
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTokenizer


def scene_batch(rng: np.random.Generator, number: int, side: int = SIDE) -> tuple[list[Scene], Tensor, Tensor]:
    """Scenes, their pictures Tensor[number, 3, side, side] from -1 to 1, and where their things are."""
    scenes = [random_scene(rng) for _ in range(number)]
    pictures, masks = zip(*(draw(scene, side) for scene in scenes))
    return scenes, 2 * torch.stack(pictures) - 1, torch.stack(masks)


def control_picture(masks: Tensor) -> Tensor:
    """What the ControlNet is shown: edges, Tensor[B, 3, H, W] from 0 to 1."""
    return edges(masks).float()[:, None].repeat(1, 3, 1, 1)


class Autoencoding(nn.Module):
    """First stage: the autoencoder, on small windows of pictures, at the end on whole ones, which norms need."""

    def __init__(self, vae: AutoencoderKL, batch_size: int):
        super().__init__()
        self.vae, self.batch_size = vae, batch_size

    def loss(self, rng: np.random.Generator, done: float) -> Tensor:
        window, number = (SIDE // 4, self.batch_size) if done < 0.6 else (SIDE, max(self.batch_size // 8, 1))
        _, pictures, _ = scene_batch(rng, number)
        corners = rng.integers(0, SIDE - window + 1, (number, 2)).tolist()
        cut = [p[:, y : y + window, x : x + window] for p, (y, x) in zip(pictures, corners, strict=True)]
        windows = torch.stack(cut)
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        posterior = self.vae.encode(windows).latent_dist
        decoded = self.vae.decode(posterior.sample(generator)).sample
        return F.l1_loss(decoded, windows) + F.mse_loss(decoded, windows) + 1e-6 * posterior.kl().mean()


def compiled_forward(network: nn.Module, args: argparse.Namespace) -> Callable[..., Any] | None:
    """The forward and not the module, which the pipeline runs, too: with its sizes it would be compiled again."""
    return torch.compile(network.forward, dynamic=False) if args.compile else None


def tokenizer_of(args: argparse.Namespace) -> CLIPTokenizer:
    """That of the folder that is gone on from, whose words have other numbers, or a new one."""
    folder = getattr(args, "begin_with", None)
    return CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer") if folder else make_tokenizer()


class OnLatents(nn.Module):
    """What the stages on latents share. half_share: the share of the budget that sees pictures at half size.

    The scenes are numbered, and the latents of each made once: the autoencoder would take a third of a step.
    """

    def __init__(
        self, vae: AutoencoderKL, text_encoder: nn.Module, scheduler: Any, args: argparse.Namespace, half_share: float
    ):
        super().__init__()
        self.text_encoder, self.vae = text_encoder, vae.requires_grad_(False)
        self.batch_size, self.half_share, self.scenes = args.batch_size, half_share, args.scenes
        self.tokenizer, self.scheduler = tokenizer_of(args), scheduler
        self.known: dict[tuple[int, int], tuple[str, Tensor, Tensor]] = {}

    def loss(self, rng: np.random.Generator, done: float) -> Tensor:
        half = done < self.half_share
        number, side = (2 * self.batch_size, SIDE // 2) if half else (self.batch_size, SIDE)
        captions, latents, masks = self.examples(rng.integers(self.scenes, size=number).tolist(), side)
        captions = ["" if rng.random() < 0.1 else caption for caption in captions]
        noisy, timesteps, target, weight = self.noised(latents, rng)
        predicted = self.predict(noisy, timesteps, captions, masks)
        return (weight * (predicted.float() - target).square().mean((1, 2, 3))).mean()

    @torch.no_grad()
    def examples(self, numbers: list[int], side: int) -> tuple[list[str], Tensor, Tensor]:
        """Captions, latents and masks of scenes by their numbers."""
        for number in dict.fromkeys(n for n in numbers if (n, side) not in self.known):
            (scene,), picture, mask = scene_batch(np.random.default_rng(number), 1, side)
            latents = self.vae.encode(picture).latent_dist.mean[0].float() * self.vae.config.scaling_factor
            self.known[number, side] = scene.caption, latents, mask[0]
        captions, latents, masks = zip(*(self.known[number, side] for number in numbers))
        return list(captions), torch.stack(latents), torch.stack(masks)

    def token_ids(self, captions: list[str]) -> Tensor:
        return self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids

    def noise(self, latents: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Noise, and how much of it each picture gets: shares Tensor[B] from 0 to 1.

        One from each stretch of the schedule: losses of different batches can be compared.
        """
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        noise = torch.randn(latents.shape, generator=generator)
        shares = (torch.arange(len(latents)) + torch.rand(len(latents), generator=generator)) / len(latents)
        return noise, shares

    def noised(self, latents: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noisy latents, their timesteps, what is to be predicted, and how much each picture counts."""
        raise NotImplementedError

    def predict(self, noisy: Tensor, timesteps: Tensor, captions: list[str], masks: Tensor) -> Tensor:
        raise NotImplementedError

    def pipeline(self) -> Any:
        """The diffusers pipeline of the stage's models."""
        raise NotImplementedError


class Denoising(OnLatents):
    """Second stage: UNet and text encoder."""

    def __init__(
        self, vae: AutoencoderKL, text_encoder: nn.Module, unet: nn.Module, args: argparse.Namespace, half_share: float
    ):
        super().__init__(vae, text_encoder, make_scheduler(), args, half_share)
        self.unet = unet
        # On a CPU, in training, SDPA is the slower of the two.
        unet.set_attn_processor(AttnProcessor())
        self.compiled = compiled_forward(unet, args)

    def predict(self, noisy: Tensor, timesteps: Tensor, captions: list[str], masks: Tensor) -> Tensor:
        return (self.compiled or self.unet)(noisy, timesteps, self.encode(captions)).sample

    def encode(self, captions: list[str]) -> Tensor:
        return self.text_encoder(self.token_ids(captions)).last_hidden_state

    def noised(self, latents: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The velocity is predicted.

        The weight is min-SNR's (Hang et al. 2023, γ = 5) on SNR + 1, so that the timesteps of most noise, in which the
        prompt decides nearly all, count in full.
        """
        noise, shares = self.noise(latents, rng)
        timesteps = (shares * self.scheduler.config.num_train_timesteps).long()
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        target = self.scheduler.get_velocity(latents, noise, timesteps)
        alpha = self.scheduler.alphas_cumprod[timesteps]
        weight = (5 * (1 - alpha)).clamp(max=1)
        return noisy, timesteps, target, weight

    def parts(self) -> dict[str, Any]:
        return {
            "vae": self.vae,
            "text_encoder": self.text_encoder,
            "tokenizer": self.tokenizer,
            "unet": self.unet,
            "scheduler": self.scheduler,
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }

    def pipeline(self) -> Any:
        return StableDiffusionPipeline(**self.parts())


class Controlling(Denoising):
    """Third stage: a ControlNet on edges; all else is frozen."""

    def __init__(self, vae: AutoencoderKL, text_encoder: nn.Module, unet: nn.Module, args: argparse.Namespace):
        super().__init__(vae, text_encoder, unet, args, half_share=0.0)
        text_encoder.requires_grad_(False)
        unet.requires_grad_(False)
        self.controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 64))
        self.controlnet.set_attn_processor(AttnProcessor())

    def predict(self, noisy: Tensor, timesteps: Tensor, captions: list[str], masks: Tensor) -> Tensor:
        text = self.encode(captions)
        down, middle = self.controlnet(noisy, timesteps, text, control_picture(masks), return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return self.unet(noisy, timesteps, text, **residuals).sample

    def pipeline(self) -> Any:
        return StableDiffusionControlNetPipeline(**self.parts(), controlnet=self.controlnet)


class Flowing(OnLatents):
    """Second stage of --network sd3: a rectified flow. Transformer and text encoder, which stands for both of SD3's."""

    def __init__(self, vae: AutoencoderKL, text_encoder: nn.Module, transformer: nn.Module, args: argparse.Namespace):
        # At half size the positions would be those of a window in the middle: all pictures are whole.
        super().__init__(vae, text_encoder, make_flow_scheduler(), args, half_share=0.0)
        self.transformer = transformer
        self.compiled = compiled_forward(transformer, args)
        # The pipeline of SD3 reads it.
        vae.register_to_config(shift_factor=0.0)

    def predict(self, noisy: Tensor, timesteps: Tensor, captions: list[str], masks: Tensor) -> Tensor:
        encoded = self.text_encoder(self.token_ids(captions), output_hidden_states=True)
        text, pooled = encoded.hidden_states[-2], encoded.text_embeds
        forward = self.compiled or self.transformer
        # What the compiler makes of plain attention has a faster gradient than SDPA's kernel for CPUs.
        with sdpa_kernel(SDPBackend.MATH) if self.compiled else nullcontext():
            return forward(
                noisy,
                encoder_hidden_states=torch.cat([text, text], -1),
                pooled_projections=torch.cat([pooled, pooled], -1),
                timestep=timesteps,
                return_dict=False,
            )[0]

    def noised(self, latents: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents and noise are joined by a line, along which the network predicts the way; its middle is seen most.

        As in SD3 (Esser et al. 2024, section 3.1): the share of noise is logit-normal.
        """
        noise, shares = self.noise(latents, rng)
        sigmas = torch.special.ndtri(shares.clamp(1e-4, 1 - 1e-4)).sigmoid()
        along = sigmas[:, None, None, None]
        timesteps = sigmas * self.scheduler.config.num_train_timesteps
        return (1 - along) * latents + along * noise, timesteps, noise - latents, torch.ones(len(latents))

    def pipeline(self) -> Any:
        return StableDiffusion3Pipeline(
            transformer=self.transformer,
            scheduler=self.scheduler,
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            text_encoder_2=self.text_encoder,
            tokenizer_2=self.tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
        )
