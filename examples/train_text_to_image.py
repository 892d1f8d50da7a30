"""Train a small Stable Diffusion on captioned shapes, from nothing: autoencoder, UNet with text encoder, ControlNet.

    python examples/train_text_to_image.py --output run      # all three, one after another; run again to go on
    python examples/train_text_to_image.py --output run --unet-minutes 120 # for longer
    python examples/train_text_to_image.py --output run --export shapes    # half-precision folder for diffusers
    python examples/train_text_to_image.py --output run --network sd3      # a transformer as SD3's, a rectified flow
    python examples/train_text_to_image.py --output run --begin-with shapes # goes on from what another run exported

The pictures are made while it trains (shape_scenes.py), so it needs no data. The folder loads as any other:

    pipe = StableDiffusionPipeline.from_pretrained("shapes")
    pipe("large red circle left and small blue ring right on pink stripes", num_inference_steps=25, guidance_scale=3)
    controlnet = ControlNetModel.from_pretrained("shapes/controlnet")

The one shaped as SD3 takes the run's autoencoder, and has no ControlNet:

    pipe = StableDiffusion3Pipeline.from_pretrained("shapes-sd3", text_encoder_3=None, tokenizer_3=None)
    pipe("large red circle left on pink stripes", num_inference_steps=25, guidance_scale=3, max_sequence_length=0)

On a CPU, one single-threaded process a core waits far less than one process with many threads:

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/train_text_to_image.py --output run

run/vae.pt, unet.pt, controlnet.pt and sd3.pt hold weights, their averages and all that going on needs;
run/metrics.json and run/samples.png what was seen of them last.
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
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from PIL import Image
from safetensors.torch import load_file
from shape_models import (
    GUIDANCE,
    make_sd3,
    make_text_encoder,
    make_unet,
    make_vae,
    model_card,
    pipeline_options,
)
from shape_scenes import edge_adherence, edges, read
from text_to_image_stages import (
    Autoencoding,
    Controlling,
    Denoising,
    Flowing,
    OnLatents,
    control_picture,
    scene_batch,
    tokenizer_of,
)
from torch import Tensor, nn
from torch import distributed as dist
from training import Stopwatch, mean_decay, process_rank

log = logging.getLogger("train")


def train(stage: Any, name: str, minutes: float, args: argparse.Namespace) -> None:
    """Trains until the stage's minutes are over, from its state if there is one; ends with the averaged weights."""
    path = Path(args.output) / f"{name}.pt"
    trained = {n: p for n, p in stage.named_parameters() if p.requires_grad}
    average = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    step, spent, clock, recent = 0, 0.0, Stopwatch(), []
    rank = process_rank()
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
        decay = mean_decay(args.ema, step)
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
            if rank == 0 and isinstance(stage, OnLatents):
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


def look(stage: OnLatents, average: dict[str, Tensor], name: str, args: argparse.Namespace, step: int) -> None:
    """Writes pictures of the averaged weights and how far they agree with their captions."""
    trained = {n: p.detach().clone() for n, p in stage.named_parameters() if n in average}
    stage.load_state_dict(average, strict=False)
    with torch.autocast("cpu", torch.bfloat16):
        scores, pictures = evaluate(stage.pipeline(), args.look_at)
    stage.load_state_dict(trained, strict=False)
    log.info("%s step %d: %s", name, step, scores)
    history = Path(args.output) / "metrics.json"
    rows = json.loads(history.read_text()) if history.exists() else []
    history.write_text(json.dumps([*rows, {"stage": name, "step": step, **scores}], indent=1))
    columns = min(8, len(pictures))
    sheet = torch.stack(pictures[: len(pictures) // columns * columns]).unflatten(0, (-1, columns))
    sheet = sheet.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    Image.fromarray((255 * sheet).byte().numpy()).save(Path(args.output) / "samples.png")


@torch.inference_mode()
def evaluate(pipe: Any, number: int, batch_size: int = 8, steps: int = 20) -> tuple[dict[str, float], list[Tensor]]:
    """Share of the captions' facts that pictures of scenes unseen in training show, and these pictures.

    With a ControlNet, it is given the scenes' edges, and how well the pictures' edges are these is scored too.
    """
    rng, facts, whole, adherence, pictures = np.random.default_rng(2**31), [], [], [], []
    controlled = hasattr(pipe, "controlnet")
    pipe.set_progress_bar_config(disable=True)
    for start in range(0, number, batch_size):
        scenes, _, masks = scene_batch(rng, min(batch_size, number - start))
        inputs = {"image": control_picture(masks)} if controlled else pipeline_options(pipe)
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


def export(stage: Controlling | Flowing, folder: Path, args: argparse.Namespace) -> None:
    """Writes the pipeline, with its ControlNet if it has one, in half precision with a model card, and scores it."""
    names = ("vae", "sd3") if isinstance(stage, Flowing) else ("vae", "unet", "controlnet")
    states = {name: torch.load(path) for name in names if (path := Path(args.output) / f"{name}.pt").exists()}
    spent = trained_before(args.begin_with)
    for name, state in states.items():
        before = spent.get(name, {"steps": 0, "minutes": 0.0})
        minutes = round(before["minutes"] + state["minutes"], 1)
        spent[name] = {"steps": before["steps"] + state["step"], "minutes": minutes}
    written = write_sd3(stage, folder) if isinstance(stage, Flowing) else write_unet(stage, folder, args)
    result: dict[str, Any] = {"training": spent, "pictures": args.look_at}
    for name, pipe in written.items():
        result[name], _ = evaluate(pipe, args.look_at)
    (folder / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
    *_, largest = written.values()
    sizes = {
        n: sum(p.numel() for p in part.parameters()) / 1e6
        for n, part in largest.components.items()
        if isinstance(part, nn.Module)
    }
    (folder / "README.md").write_text(model_card(sizes, result))
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 1e6
    log.info("%s: %.1f MB, %s", folder, size, result)


def write_unet(stage: Controlling, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The pipelines of what was written; a ControlNet is, where the run trained one."""
    parts = dict(stage.pipeline().components)
    controlnet = parts.pop("controlnet")
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.to(torch.float16).save_pretrained(folder)
    load_as_float32(folder)
    written = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    if not (Path(args.output) / "controlnet.pt").exists():
        return {"text": written}
    controlnet.half().save_pretrained(folder / "controlnet")
    controlnet = ControlNetModel.from_pretrained(folder / "controlnet")
    controlled = StableDiffusionControlNetPipeline(
        **written.components, controlnet=controlnet, requires_safety_checker=False
    )
    return {"text": written, "control": controlled}


def write_sd3(stage: Flowing, folder: Path) -> dict[str, Any]:
    """The pipeline of what was written."""
    stage.pipeline().to(torch.float16).save_pretrained(folder)
    load_as_float32(folder)
    return {"text": StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)}


def load_as_float32(folder: Path) -> None:
    """Half on disk, float32 when loaded: many CPUs compute half precision slowly or not at all."""
    for path in folder.glob("text_encoder*/config.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "float32"}, indent=2) + "\n")


def main() -> None:
    args = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        log.disabled = dist.get_rank() > 0
    torch.manual_seed(args.seed)
    Path(args.output).mkdir(parents=True, exist_ok=True)
    vae = make_vae(args.vae_width)
    start_from(args.begin_with, vae=vae)
    # Exporting trains for no time: it takes the averages as they are. So does an autoencoder that is trained already.
    trained = args.export or args.begin_with
    train(Autoencoding(vae, args.batch_size), "vae", 0.0 if trained else args.vae_minutes, args)
    set_scaling_factor(vae)
    stage = trained_sd3(vae, args) if args.network == "sd3" else trained_unet(vae, args)
    if args.export:
        export(stage, Path(args.export), args)


def trained_unet(vae: AutoencoderKL, args: argparse.Namespace) -> Controlling:
    text_encoder = make_text_encoder(tokenizer_of(args), args.text_width)
    unet = make_unet(tuple(args.widths), args.text_width)
    start_from(args.begin_with, text_encoder=text_encoder, unet=unet)
    minutes = (0.0, 0.0) if args.export else (args.unet_minutes, args.controlnet_minutes)
    train(Denoising(vae, text_encoder, unet, args, args.half_share), "unet", minutes[0], args)
    controlling = Controlling(vae, text_encoder, unet, args)
    train(controlling, "controlnet", minutes[1], args)
    return controlling


def trained_sd3(vae: AutoencoderKL, args: argparse.Namespace) -> Flowing:
    text_encoder = make_text_encoder(tokenizer_of(args), args.text_width, pooled=True)
    transformer = make_sd3(args.layers, args.width, args.text_width)
    start_from(args.begin_with, text_encoder=text_encoder, transformer=transformer)
    stage = Flowing(vae, text_encoder, transformer, args)
    train(stage, "sd3", 0.0 if args.export else args.sd3_minutes, args)
    return stage


def start_from(folder: str | None, **networks: nn.Module) -> None:
    """The weights of an exported folder, if there is one, by its parts' names."""
    for name, network in networks.items() if folder else ():
        (weights,) = Path(folder, name).glob("*.safetensors")
        network.load_state_dict(load_file(weights))


def trained_before(folder: str | None) -> dict[str, dict[str, float]]:
    """Steps and minutes of each stage of an exported folder, but a ControlNet's, which begins anew."""
    stages = json.loads(Path(folder, "metrics.json").read_text())["training"] if folder else {}
    return {name: spent for name, spent in stages.items() if name != "controlnet"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", required=True, help="folder of the run; training goes on from what is there")
    parser.add_argument("--export", metavar="FOLDER", help="write the run's averaged models in half precision and stop")
    parser.add_argument(
        "--begin-with", metavar="FOLDER", help="an exported one to go on from; give it to --export as well"
    )
    parser.add_argument("--network", choices=("unet", "sd3"), default="unet", help="what denoises")
    parser.add_argument("--vae-minutes", type=float, default=8)
    parser.add_argument("--unet-minutes", type=float, default=65)
    parser.add_argument("--controlnet-minutes", type=float, default=18)
    parser.add_argument("--sd3-minutes", type=float, default=120)
    parser.add_argument("--max-steps", type=int, default=10**9, help="of each stage, if that comes first")
    parser.add_argument("--batch-size", type=int, default=8, help="a process")
    parser.add_argument("--scenes", type=int, default=8192, help="different ones to learn from")
    parser.add_argument("--half-share", type=float, default=0.25, help="of the UNet's budget, on pictures of half size")
    parser.add_argument("--widths", type=int, nargs="+", default=(32, 96, 128), help="of the UNet, multiples of 32")
    parser.add_argument("--width", type=int, default=128, help="of SD3's transformer, a multiple of 32")
    parser.add_argument("--layers", type=int, default=8, help="of SD3's transformer")
    parser.add_argument(
        "--compile", action="store_true", help="what denoises: the first step of each size waits, all are shorter"
    )
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
