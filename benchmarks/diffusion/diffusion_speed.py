"""One step of full-size Stable Diffusion UNets: tomesd, ToDo and AiluRus over SDPA, in turn on the same weights.

    python -m benchmarks.diffusion.diffusion_speed        # SD 1.5 at 512, 768 and 1024, fp32, CPU
    python -m benchmarks.diffusion.diffusion_speed --model sdxl --size 1024 --dtype bf16
    python -m benchmarks.diffusion.diffusion_speed --device cuda --dtype bf16 --batch 2
    python -m benchmarks.diffusion.diffusion_speed --device cuda --dtype bf16 --steps 50             # whole generations
    python -m benchmarks.diffusion.diffusion_speed --device cuda --dtype bf16 --steps 50 --compile
    python -m benchmarks.diffusion.diffusion_speed --size 512 --steps 20 --methods "blocks 0.25" --full-every 3 5

A whole generation is of one prompt under guidance, without text encoder and autoencoder. Compiled, every method has a
UNet of its own on the same weights, because a graph holds what was on when it was made.

Random weights: speed does not depend on them. Fidelity here is the cosine to the plain UNet's output on noise (with
--full-every or DeepCache, of whole generations), a lower bound; quality is measured on a trained model. Every contender
is undone before the next one's turn.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor

from ailurus_hf import ailurus_status
from ailurus_hf.clustering import get_clustering
from ailurus_hf.diffusion.apply import reducers_of
from ailurus_hf.diffusion.cluster_tokens import cluster_tokens
from ailurus_hf.evaluation.timing import wait_for

from ..harness import DTYPES, environment, interleaved, log, measured_columns, methods_in_turn, model_flops, save
from ..methods.diffusion import (
    INNER_EVERY,
    OURS,
    add_full_every,
    add_inner_every,
    counts_steps,
    method_of_unets,
    switch_on,
    with_full_steps,
)

MODELS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
SIZES = {"sd15": [512, 768, 1024], "sdxl": [1024]}


# What runs unless others are named.
SHOWN = (
    "plain",
    "tomesd 0.5, max_downsample 1",
    "tomesd 0.75, max_downsample 2, all",
    "ToDo 2",
    "attention 0.25",
    "keys 0.25",
    "keys 0.0625 at full size, blocks 0.25 at half",
    "blocks 0.5",
    "blocks 0.25",
    "blocks of each stack 0.25",
    "blocks 0.25, merged projections",
)
COLUMNS = {
    "model": "model",
    "size": "image|{}²",
    "steps": "steps",
    "method": "method",
    "ms": "time|{:.0f} ms",
    "speed_up": "speed-up|{:.2f}×",
    "ideal": "FLOPs-ideal|{:.2f}×",
    "share_of_ideal": "share|{:.3f}",
    "compile_s": "compiling|{:.0f} s",
    "overhead": "cluster + merge + unmerge|{:.2%}",
    "peak_mib": "peak memory|{:.0f} MiB",
    "cosine": "cosine|{:.3f}",
}


def inputs(model: str, size: int, batch: int, number: int) -> dict[str, Any]:
    """Arguments of one step on CPU in fp32; another number gives other latents."""
    fields = MODELS[model]
    generator = torch.Generator().manual_seed(number)
    made: dict[str, Any] = {
        "sample": torch.randn(batch, 4, size // 8, size // 8, generator=generator),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(batch, 77, fields["cross_attention_dim"], generator=generator),
    }
    if "addition_embed_type" in fields:
        width = fields["projection_class_embeddings_input_dim"] - 6 * fields["addition_time_embed_dim"]
        time_ids = torch.tensor([size, size, 0, 0, size, size], dtype=torch.float32).repeat(batch, 1)
        made["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, width, generator=generator),
            "time_ids": time_ids,
        }
    return made


def moved(values: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if isinstance(values, dict):
        return {name: moved(value, device, dtype) for name, value in values.items()}
    return values.to(device, dtype if values.is_floating_point() else None)


def step_of(unet: UNet2DConditionModel, arguments: dict[str, Any]) -> Tensor:
    """One step, called as pipelines do: tomesd reads the first argument by position."""
    named = {name: value for name, value in arguments.items() if name not in ("sample", "timestep")}
    result: Tensor = unet(arguments["sample"], arguments["timestep"], **named).sample
    return result


def pipeline_of(model: str, unet: Any) -> Any:
    """Stable Diffusion's own pipeline around a UNet, that takes embeddings instead of prompts and returns latents."""
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "feature_extractor"))
    if model == "sdxl":
        parts |= dict.fromkeys(("text_encoder_2", "tokenizer_2", "image_encoder"))
        pipe = StableDiffusionXLPipeline(**parts, unet=unet, scheduler=scheduler, add_watermarker=False)
    else:
        parts["safety_checker"] = None
        pipe = StableDiffusionPipeline(**parts, unet=unet, scheduler=scheduler, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generation(pipe: Any, arguments: dict[str, Any], steps: int) -> Tensor:
    """Latents of a whole generation from one step's arguments."""
    sample, embeds = arguments["sample"], arguments["encoder_hidden_states"]
    pooled = {}
    if "added_cond_kwargs" in arguments:
        text = arguments["added_cond_kwargs"]["text_embeds"]
        pooled = {"pooled_prompt_embeds": text, "negative_pooled_prompt_embeds": -text}
    height, width = (8 * side for side in sample.shape[-2:])
    made: Tensor = pipe(
        prompt_embeds=embeds,
        negative_prompt_embeds=-embeds,
        **pooled,
        latents=sample,
        height=height,
        width=width,
        num_inference_steps=steps,
        output_type="latent",
    ).images
    return made


def full_flops(model: str, size: int, batch: int) -> int:
    """FLOPs of the plain step, counted without computing anything."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**MODELS[model]).eval()
    arguments = moved(inputs(model, size, batch, 0), torch.device("meta"), torch.float32)
    return model_flops(lambda: step_of(unet, arguments))


def clustering_steps(unet: UNet2DConditionModel) -> Callable[[], None]:
    """What AiluRus adds to a step: one clustering per resolution or stack, a merge and an unmerge per stack."""
    reducer = reducers_of(unet)[0][1]
    cluster, batch, work = get_clustering(reducer.config.clustering), 1, []
    for stack in reducer.stacks:
        record = reducer.records[stack.name]
        if record.last_clusters is None or record.last_grid is None:
            continue
        batch = record.last_clusters.assignment.shape[0]
        width, like = stack.blocks[0].attn1.inner_dim, next(stack.module.parameters())
        tokens = torch.randn(batch, record.last_tokens, width, device=like.device, dtype=like.dtype)
        key = stack.name if reducer.config.cluster_per == "stack" else record.last_grid
        work.append((key, record.last_grid, record.last_clusters_count, tokens))

    def run() -> None:
        made: dict[Any, Any] = {}
        for key, grid, count, tokens in work:
            if key not in made:
                made[key] = cluster_tokens(cluster, tokens, grid, count)
            clusters = made[key]
            merged = clusters.merge(tokens)
            # As restored: what the representatives gained, added to the tokens.
            _ = tokens + clusters.unmerge(merged - merged)

    return run


def inputs_for(unet: UNet2DConditionModel, model: str, size: int, batch: int) -> list[dict[str, Any]]:
    """Arguments of two different steps, where the UNet is and in its precision."""
    return [moved(inputs(model, size, batch, number), unet.device, unet.dtype) for number in range(2)]


def runner(target: Any, given: list[dict[str, Any]], steps: int | None = None) -> Callable[[int], Tensor]:
    """A step of a UNet on the inputs of a number, or a whole generation of a pipeline."""
    run = partial(generation, steps=steps) if steps else step_of
    return lambda number: run(target, given[number % len(given)])


def plain_first(methods: list[str]) -> list[str]:
    return ["plain", *(name for name in methods if name != "plain")]


@torch.inference_mode()
def measure(
    model: str,
    size: int,
    methods: list[str],
    repeats: int,
    *,
    unet: UNet2DConditionModel,
    batch: int = 1,
    steps: int | None = None,
) -> list[dict[str, Any]]:
    """One row a method. Methods share the UNet: each is on during its own turn only.

    steps: times whole generations of so many, not single steps.
    """
    given = inputs_for(unet, model, size, batch)
    target = pipeline_of(model, unet) if steps else unet
    # In single steps, timestep and all are the same in each turn: clusters are made in each, more often than in any
    # use.
    more = {} if steps else {"refresh_every": 1}
    # A step alone is none of a generation, of which every k-th runs on all tokens.
    counted = steps if any(map(counts_steps, methods)) else None
    rows = methods_in_turn(
        unet,
        {name: partial(switch_on, name, target, (size // 8) ** 2, **more) for name in plain_first(methods)},
        runner(target if counted else unet, given, counted),
        full_flops(model, size, batch),
        repeats,
        unet.device,
        images=batch,
        timed=runner(target, given, steps),
        beside=None if steps else lambda: clustering_steps(unet),
        whole=bool(steps),
    )
    for name, row in rows.items():
        if INNER_EVERY in name:
            # The status knows of the stacks of blocks alone, and convolutions are left out, too.
            row.pop("ideal", None)
            row.pop("share_of_ideal", None)
    about = {"model": model, "size": size, "batch": batch, "steps": steps}
    return [{**about, "ms": 1e3 * row.pop("seconds"), **row} for row in rows.values()]


@torch.inference_mode()
def measure_compiled(
    model: str,
    size: int,
    methods: list[str],
    repeats: int,
    *,
    unet: UNet2DConditionModel,
    batch: int = 1,
    steps: int | None = None,
    backend: str = "inductor",
) -> list[dict[str, Any]]:
    """As `measure`, without memory and fidelity, of UNets of their own on shared weights, compiled with the method on.

    Plain and ours as one graph; the others may break it. Compile time is that of the first step, with no cache of
    earlier runs.
    """
    given, full = inputs_for(unet, model, size, batch), full_flops(model, size, batch)
    contenders: dict[str, Callable[[int], Any]] = {}
    rows: list[dict[str, Any]] = []
    names = plain_first(methods)
    # All twins run the same code, of which torch keeps no more than 8 graphs unless told otherwise.
    limit = torch._dynamo.config.patch(recompile_limit=8 * len(names))
    with limit, torch._inductor.config.patch(force_disable_caches=True):
        for name in names:
            twin = twin_of(model, unet)
            switch_on(name, twin, (size // 8) ** 2)
            step_of(twin, given[0])
            row: dict[str, Any] = {"method": name}
            if (status := ailurus_status(twin)).active:
                row["ideal"] = full / (full - batch * status.saved_flops)
            compiled = torch.compile(twin, fullgraph=name == "plain" or name in OURS, backend=backend)
            start = time.perf_counter()
            step_of(compiled, given[0])
            wait_for(unet.device)
            rows.append({**row, "compile_s": time.perf_counter() - start})
            contenders[name] = runner(pipeline_of(model, compiled) if steps else compiled, given, steps)
        seconds = interleaved(contenders, repeats, warmup=2, device=unet.device)
    about = {"model": model, "size": size, "batch": batch, "steps": steps, "compiled": True}
    for row in rows:
        row |= {"ms": 1e3 * seconds[row["method"]], "speed_up": seconds["plain"] / seconds[row["method"]]}
        if "ideal" in row:
            row["share_of_ideal"] = row["speed_up"] / row["ideal"]
    return [{**about, **row} for row in rows]


def twin_of(model: str, unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Another UNet on the same weights."""
    with torch.device("meta"):
        twin = UNet2DConditionModel(**MODELS[model]).eval()
    twin.load_state_dict(unet.state_dict(), assign=True)
    return twin


def make_unet(model: str, device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    """A UNet of full size with random weights, made in its precision: SDXL in fp32 takes 10 GB."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return UNet2DConditionModel(**MODELS[model]).eval()
    finally:
        torch.set_default_dtype(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd15", choices=MODELS)
    parser.add_argument("--size", nargs="+", type=int, help="image sides in pixels, multiples of 64")
    parser.add_argument("--methods", nargs="+", default=SHOWN, type=method_of_unets, metavar="METHOD")
    add_full_every(parser)
    add_inner_every(parser)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1, help="2 is one image with guidance")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own")
    parser.add_argument(
        "--channels-last", action="store_true", help="weights and images of convolutions in that layout"
    )
    parser.add_argument("--steps", type=int, help="time whole generations of so many steps")
    parser.add_argument("--compile", action="store_true", help="by torch.compile; no memory, no fidelity")
    parser.add_argument("--name", help="of the result file (default: diffusion_speed_MODEL and what was asked for)")
    args = parser.parse_args()
    methods = with_full_steps(args.methods, args.full_every, args.inner_every)
    if (over_steps := list(filter(counts_steps, methods))) and (args.compile or not args.steps):
        parser.error(f"{over_steps[0]!r} is for whole generations that are not compiled: --steps, without --compile")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.threads:
        torch.set_num_threads(args.threads)
    unet, rows = make_unet(args.model, args.device, DTYPES[args.dtype]), []
    if args.channels_last:
        unet = unet.to(memory_format=torch.channels_last)
    options = {"unet": unet, "batch": args.batch, "steps": args.steps}
    for size in args.size or SIZES[args.model]:
        run = measure_compiled if args.compile else measure
        new = run(args.model, size, methods, args.repeats, **options)
        log.info(measured_columns(new, COLUMNS))
        rows += new
    kind = "_whole" * bool(args.steps) + "_compiled" * args.compile
    save(args.name or f"diffusion_speed_{args.model}{kind}", rows, environment(args.device, args.dtype))
    print(measured_columns(rows, COLUMNS))


if __name__ == "__main__":
    main()
