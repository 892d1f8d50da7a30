"""Train a small Stable Diffusion on captioned shapes, from nothing: autoencoder, UNet with text encoder, ControlNet.

    python examples/train_text_to_image.py --output run      # all three, one after another; run again to go on
    python examples/train_text_to_image.py --output run --unet-minutes 120 # for longer
    python examples/train_text_to_image.py --output run --export shapes    # half-precision folder for diffusers

The pictures are made while it trains (shape_scenes.py), so it needs no data. The folder loads as any other:

    pipe = StableDiffusionPipeline.from_pretrained("shapes")
    pipe("large red circle left and small blue ring right on pink stripes", num_inference_steps=25, guidance_scale=3)
    controlnet = ControlNetModel.from_pretrained("shapes/controlnet")

On a CPU, one single-threaded process a core waits far less than one process with many threads:

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/train_text_to_image.py --output run

run/vae.pt, unet.pt and controlnet.pt hold weights, their averages and all that going on needs; run/metrics.json and
run/samples.png what was seen of them last.
"""

import argparse
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from shape_models import GUIDANCE, make_scheduler, make_text_encoder, make_tokenizer, make_unet, make_vae, model_card
from shape_scenes import SIDE, Scene, draw, edge_adherence, edges, random_scene, read
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from training import Stopwatch
from transformers import CLIPTextModel

log = logging.getLogger("train")


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


class Denoising(nn.Module):
    """Second stage: UNet and text encoder. half_share: the share of the budget that sees pictures at half size.

    The scenes are numbered, and the latents of each made once: the autoencoder would take a third of a step.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        unet: nn.Module,
        args: argparse.Namespace,
        half_share: float,
    ):
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet
        # On a CPU, in training, SDPA is the slower of the two.
        unet.set_attn_processor(AttnProcessor())
        self.batch_size, self.half_share, self.scenes = args.batch_size, half_share, args.scenes
        self.vae, self.tokenizer, self.scheduler = vae.requires_grad_(False), make_tokenizer(), make_scheduler()
        self.known: dict[tuple[int, int], tuple[str, Tensor, Tensor]] = {}

    def loss(self, rng: np.random.Generator, done: float) -> Tensor:
        half = done < self.half_share
        number, side = (2 * self.batch_size, SIDE // 2) if half else (self.batch_size, SIDE)
        captions, latents, masks = self.examples(rng.integers(self.scenes, size=number).tolist(), side)
        captions = ["" if rng.random() < 0.1 else caption for caption in captions]
        noisy, timesteps, target, weight = self.noised(latents, rng)
        predicted = self.predict(noisy, timesteps, self.encode(captions), masks)
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

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Tensor, masks: Tensor) -> Tensor:
        return self.unet(noisy, timesteps, text).sample

    def encode(self, captions: list[str]) -> Tensor:
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        return self.text_encoder(tokens.input_ids).last_hidden_state

    def noised(self, latents: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noisy latents, their timesteps, the velocity to predict, and how much each picture counts.

        The weight is min-SNR's (Hang et al. 2023, γ = 5) on SNR + 1, so that the timesteps of most noise, in which the
        prompt decides nearly all, count in full.
        """
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        noise = torch.randn(latents.shape, generator=generator)
        # One from each stretch of the schedule: losses of different batches can be compared.
        count = self.scheduler.config.num_train_timesteps
        shares = (torch.arange(len(latents)) + torch.rand(len(latents), generator=generator)) / len(latents)
        timesteps = (shares * count).long()
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        target = self.scheduler.get_velocity(latents, noise, timesteps)
        alpha = self.scheduler.alphas_cumprod[timesteps]
        weight = (5 * (1 - alpha)).clamp(max=1)
        return noisy, timesteps, target, weight


class Controlling(Denoising):
    """Third stage: a ControlNet on edges; all else is frozen."""

    def __init__(self, vae: AutoencoderKL, text_encoder: CLIPTextModel, unet: nn.Module, args: argparse.Namespace):
        super().__init__(vae, text_encoder, unet, args, half_share=0.0)
        text_encoder.requires_grad_(False)
        unet.requires_grad_(False)
        self.controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 64))
        self.controlnet.set_attn_processor(AttnProcessor())

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Tensor, masks: Tensor) -> Tensor:
        down, middle = self.controlnet(noisy, timesteps, text, control_picture(masks), return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return self.unet(noisy, timesteps, text, **residuals).sample


def train(stage: Any, name: str, minutes: float, args: argparse.Namespace) -> None:
    """Trains until the stage's minutes are over, from its state if there is one; ends with the averaged weights."""
    path = Path(args.output) / f"{name}.pt"
    trained = {n: p for n, p in stage.named_parameters() if p.requires_grad}
    average = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    step, spent, clock, recent = 0, 0.0, Stopwatch(), []
    rank = dist.get_rank() if dist.is_initialized() else 0
    if path.exists():
        state = torch.load(path)
        stage.load_state_dict(state["weights"], strict=False)
        average = state["average"]
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["minutes"]
        log.info("%s: on from step %d, %.1f of %.1f minutes", name, step, spent, minutes)

    def save() -> None:
        if rank:
            return
        weights = {n: p.detach() for n, p in trained.items()}
        state = {"weights": weights, "average": average, "optimizer": optimizer.state_dict()}
        fresh = path.with_suffix(".new")
        torch.save({**state, "step": step, "minutes": spent}, fresh)
        fresh.replace(path)

    saved = seen = spent
    last = time.time()
    while spent < minutes and step < args.max_steps:
        done = spent / minutes
        rng = np.random.default_rng((args.seed, len(name), step, rank))
        lr = args.lr * min(1.0, (step + 1) / args.warmup_steps, (1 - done) / args.decay_share)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast("cpu", torch.bfloat16):
            loss = stage.loss(rng, done)
        loss.backward()
        now = time.time()
        taken, last = torch.tensor(now - last), now
        average_over_processes([*(p.grad for p in trained.values() if p.grad is not None), taken])
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        decay = min(args.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), list(trained.values()), 1 - decay)

        spent += clock.counted(taken.item()) / 60
        recent = [*recent[-199:], loss.item()]
        if step % 50 == 0:
            log.info(
                "%s step %d  %.1f min  loss %.4f  %.2f s a step", name, step, spent, np.mean(recent), clock.typical
            )
        if spent - saved >= args.save_minutes:
            saved = spent
            save()
        if spent - seen >= args.look_minutes:
            seen = spent
            if rank == 0 and isinstance(stage, Denoising):
                look(stage, average, name, args, step)
            last = time.time()
    if minutes:
        save()
    stage.load_state_dict(average, strict=False)


def average_over_processes(values: list[Tensor]) -> None:
    """In place, and the same on all of them."""
    if dist.is_initialized():
        flat = torch.cat([value.flatten() for value in values])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for value, part in zip(values, flat.split([value.numel() for value in values]), strict=True):
            value.copy_(part.view_as(value))


def look(stage: Denoising, average: dict[str, Tensor], name: str, args: argparse.Namespace, step: int) -> None:
    """Writes pictures of the averaged weights and how far they agree with their captions."""
    trained = {n: p.detach().clone() for n, p in stage.named_parameters() if n in average}
    stage.load_state_dict(average, strict=False)
    with torch.autocast("cpu", torch.bfloat16):
        scores, pictures = evaluate(pipeline_of(stage), args.look_at)
    stage.load_state_dict(trained, strict=False)
    log.info("%s step %d: %s", name, step, scores)
    history = Path(args.output) / "metrics.json"
    rows = json.loads(history.read_text()) if history.exists() else []
    history.write_text(json.dumps([*rows, {"stage": name, "step": step, **scores}], indent=1))
    columns = min(8, len(pictures))
    sheet = torch.stack(pictures[: len(pictures) // columns * columns]).unflatten(0, (-1, columns))
    sheet = sheet.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    Image.fromarray((255 * sheet).byte().numpy()).save(Path(args.output) / "samples.png")


def pipeline_of(stage: Denoising) -> Any:
    """The diffusers pipeline of a stage's models, with its ControlNet if it has one."""
    parts = {
        "vae": stage.vae,
        "text_encoder": stage.text_encoder,
        "tokenizer": stage.tokenizer,
        "unet": stage.unet,
        "scheduler": stage.scheduler,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    if isinstance(stage, Controlling):
        pipe = StableDiffusionControlNetPipeline(**parts, controlnet=stage.controlnet)
    else:
        pipe = StableDiffusionPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.inference_mode()
def evaluate(pipe: Any, number: int, batch_size: int = 8, steps: int = 20) -> tuple[dict[str, float], list[Tensor]]:
    """Share of the captions' facts that pictures of scenes unseen in training show, and these pictures.

    With a ControlNet, it is given the scenes' edges, and how well the pictures' edges are these is scored too.
    """
    rng, facts, whole, adherence, pictures = np.random.default_rng(2**31), [], [], [], []
    controlled = hasattr(pipe, "controlnet")
    for start in range(0, number, batch_size):
        scenes, _, masks = scene_batch(rng, min(batch_size, number - start))
        inputs = {"image": control_picture(masks)} if controlled else {}
        made = pipe(
            [scene.caption for scene in scenes],
            **inputs,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(scenes))],
            output_type="pt",
        ).images.float()
        for scene, picture, mask in zip(scenes, made, masks, strict=True):
            shown = read(picture, scene)
            facts += shown.values()
            whole.append(all(shown.values()))
            pictures.append(picture)
            if controlled:
                adherence.append(edge_adherence(picture, edges(mask)))
    scores = {"facts": round(float(np.mean(facts)), 3), "whole captions": round(float(np.mean(whole)), 3)}
    if controlled:
        scores["edges"] = round(float(np.mean(adherence)), 3)
    return scores, pictures


@torch.no_grad()
def set_scaling_factor(vae: AutoencoderKL) -> None:
    """Latents of unit variance; measured on pictures, and kept in the autoencoder's config."""
    _, pictures, _ = scene_batch(np.random.default_rng(0), 32)
    vae.register_to_config(scaling_factor=round(1 / vae.encode(pictures).latent_dist.mean.std().item(), 5))


def export(stage: Controlling, folder: Path, args: argparse.Namespace) -> None:
    """Writes the pipeline and its ControlNet in half precision with a model card, and scores what was written."""
    states = {path.stem: torch.load(path) for path in sorted(Path(args.output).glob("*.pt"))}
    spent = {n: {"steps": state["step"], "minutes": round(state["minutes"], 1)} for n, state in states.items()}
    parts = dict(pipeline_of(stage).components)
    controlnet = parts.pop("controlnet")
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.to(torch.float16).save_pretrained(folder)
    controlnet.half().save_pretrained(folder / "controlnet")
    # Half on disk, float32 when loaded: many CPUs compute half precision slowly or not at all.
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    (folder / "text_encoder" / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")

    written = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    controlnet = ControlNetModel.from_pretrained(folder / "controlnet")
    controlled = StableDiffusionControlNetPipeline(
        **written.components, controlnet=controlnet, requires_safety_checker=False
    )
    result: dict[str, Any] = {"training": spent, "pictures": args.look_at}
    for name, pipe in {"text": written, "control": controlled}.items():
        pipe.set_progress_bar_config(disable=True)
        result[name], _ = evaluate(pipe, args.look_at)
    (folder / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
    sizes = {
        n: sum(p.numel() for p in part.parameters()) / 1e6
        for n, part in controlled.components.items()
        if isinstance(part, nn.Module)
    }
    (folder / "README.md").write_text(model_card(sizes, result))
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 1e6
    log.info("%s: %.1f MB, %s", folder, size, result)


def main() -> None:
    args = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        log.disabled = dist.get_rank() > 0
    torch.manual_seed(args.seed)
    Path(args.output).mkdir(parents=True, exist_ok=True)
    tokenizer, vae = make_tokenizer(), make_vae(args.vae_width)
    text_encoder = make_text_encoder(tokenizer, args.text_width)
    unet = make_unet(tuple(args.widths), args.text_width)
    # Exporting trains for no time: it takes the averages as they are.
    budget = (0.0, 0.0, 0.0) if args.export else (args.vae_minutes, args.unet_minutes, args.controlnet_minutes)
    train(Autoencoding(vae, args.batch_size), "vae", budget[0], args)
    set_scaling_factor(vae)
    train(Denoising(vae, text_encoder, unet, args, args.half_share), "unet", budget[1], args)
    controlling = Controlling(vae, text_encoder, unet, args)
    train(controlling, "controlnet", budget[2], args)
    if args.export:
        export(controlling, Path(args.export), args)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", required=True, help="folder of the run; training goes on from what is there")
    parser.add_argument("--export", metavar="FOLDER", help="write the run's averaged models in half precision and stop")
    parser.add_argument("--vae-minutes", type=float, default=8)
    parser.add_argument("--unet-minutes", type=float, default=65)
    parser.add_argument("--controlnet-minutes", type=float, default=18)
    parser.add_argument("--max-steps", type=int, default=10**9, help="of each stage, if that comes first")
    parser.add_argument("--batch-size", type=int, default=8, help="a process")
    parser.add_argument("--scenes", type=int, default=8192, help="different ones to learn from")
    parser.add_argument("--half-share", type=float, default=0.25, help="of the UNet's budget, on pictures of half size")
    parser.add_argument("--widths", type=int, nargs="+", default=(32, 96, 128), help="of the UNet, multiples of 32")
    parser.add_argument("--text-width", type=int, default=128)
    parser.add_argument("--vae-width", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--decay-share", type=float, default=0.3, help="share of a stage in which lr falls to 0")
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--save-minutes", type=float, default=3, help="of training between saved states")
    parser.add_argument("--look-minutes", type=float, default=10, help="of training between samples")
    parser.add_argument("--look-at", type=int, default=16, help="samples")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
