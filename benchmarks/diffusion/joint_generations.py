"""Whole generations of SD3's and Flux's transformers: ours beside ToMA, ClusCa and TaylorSeer, over SDPA.

    python -m benchmarks.diffusion.joint_generations --size 512 --steps 20       # a few layers of the true width
    python -m benchmarks.diffusion.joint_generations --layers 24 --device cuda --dtype bf16
    python -m benchmarks.diffusion.joint_generations --model flux --layers 6 --dtype bf16

As joint_speed: random weights, so a few layers, which cost alike; the pipeline's text encoders and autoencoder are left
out, and so is guidance. What a method does in a step does not depend on the weights, but for FirstBlockCache, which
looks at how much a step changes and so cannot be timed here. Quality is measured on a trained model
(diffusion_quality); the cosine to the plain latents is of noise, a lower bound. Of the peers TaylorSeer alone is
written for Flux.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ailurus_hf import ailurus_status
from ailurus_hf.diffusion import denoising
from ailurus_hf.diffusion.stacks import find_stacks

from ..harness import DTYPES, environment, interleaved, log, markdown, model_flops, save, switched
from ..methods.diffusion import (
    METHODS_OF_TRANSFORMERS,
    add_full_every,
    is_ours,
    needs_pipeline,
    switch_on,
    with_full_steps,
)
from .joint_speed import MODELS, inputs, make, num_tokens

METHODS = tuple(
    name for name in METHODS_OF_TRANSFORMERS if not name.startswith("FirstBlockCache") and not needs_pipeline(name)
)
METHODS_OF_FLUX = tuple(name for name in METHODS if name == "plain" or name.startswith("TaylorSeer") or is_ours(name))
SHOWN = (
    "plain",
    "ToMA 0.5",
    "ToMA 0.5, all",
    "ToMA 0.25, all",
    "ClusCa 3",
    "ClusCa 5",
    "random representatives 0.25",
    "blocks 0.5 after layer 0, every 4 steps",
    "blocks 0.25 after layer 0, every 4 steps",
)
COLUMNS = {
    "model": "model",
    "tokens": "tokens|{}",
    "layers": "layers|{}",
    "steps": "steps|{}",
    "method": "method",
    "tflops": "generation|{:.2f} TFLOP",
    "fewer_flops": "fewer FLOPs|{:.2f}×",
    "ms": "generation|{:.0f} ms",
    "speed_up": "speed-up|{:.2f}×",
    "share_of_ideal": "share|{:.3f}",
    "cosine": "cosine|{:.3f}",
}


def generation(network: Any, arguments: dict[str, Any], steps: int) -> Tensor:
    """Latents of a whole generation from one step's arguments."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps, device=arguments["hidden_states"].device)
    latents = arguments["hidden_states"]
    # Flux is told times from 0 to 1, as its pipeline does.
    unit = 1000 if isinstance(network, FluxTransformer2DModel) else 1
    with denoising(network, scheduler) if ailurus_status(network).active else nullcontext():
        for timestep in scheduler.timesteps:
            moving = {"hidden_states": latents, "timestep": timestep.expand(len(latents)) / unit}
            latents = scheduler.step(network(**{**arguments, **moving})[0], timestep, latents, return_dict=False)[0]
    return latents


@torch.inference_mode()
def measure(
    network: Any, model: str, size: int, methods: Sequence[str], steps: int, repeats: int, device: torch.device
) -> list[dict[str, Any]]:
    """One row a method, plain first; each is on during its own turn only."""
    dtype = next(network.parameters()).dtype
    given = [inputs(network, model, size, device, dtype, number) for number in range(2)]
    tokens, layers = num_tokens(given[0], model), sum(len(stack.blocks) for stack in find_stacks(network))
    names = ["plain", *(name for name in methods if name != "plain")]
    rows: dict[str, dict[str, Any]] = {}
    plain: Tensor | None = None
    for name in names:
        made: list[Tensor] = []
        with switched(lambda name=name: switch_on(name, network, tokens)):
            generation(network, given[0], 1)  # tables of the grid are made once
            flops = model_flops(lambda made=made: made.append(generation(network, given[0], steps)))
        out = made[0].float().flatten()
        plain = out if plain is None else plain
        rows[name] = {"model": model, "tokens": tokens, "layers": layers, "steps": steps, "method": name}
        rows[name] |= {"tflops": flops / 1e12, "cosine": cosine_similarity(out, plain, 0).item()}
    seconds = interleaved(
        dict.fromkeys(names, lambda number: generation(network, given[number % 2], steps)),
        repeats,
        warmup=0,
        device=device,
        around=lambda name: switched(lambda: switch_on(name, network, tokens)),
    )
    for name, row in rows.items():
        row["fewer_flops"] = rows["plain"]["tflops"] / row["tflops"]
        row["ms"], row["speed_up"] = 1e3 * seconds[name], seconds["plain"] / seconds[name]
        row["share_of_ideal"] = row["speed_up"] / row["fewer_flops"]
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd3", choices=[name for name in MODELS if not name.startswith("wan")])
    parser.add_argument("--size", nargs="+", type=int, default=[512], help="picture sides in pixels, multiples of 128")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--methods", nargs="+", default=SHOWN, choices=METHODS, metavar="METHOD")
    add_full_every(parser)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--name", default="joint_generations", help="of the result file")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    methods = with_full_steps(args.methods, args.full_every)
    if args.model == "flux" and (others := {*args.methods} - {*METHODS_OF_FLUX}):
        parser.error(f"not written for Flux: {sorted(others)}")
    network, rows = make(args.model, args.layers, args.device, DTYPES[args.dtype]), []
    for size in args.size:
        new = measure(network, args.model, size, methods, args.steps, args.repeats, args.device)
        log.info(markdown(new, COLUMNS))
        rows += new
    save(args.name, rows, environment(args.device, args.dtype))
    print(markdown(rows, COLUMNS))


if __name__ == "__main__":
    main()
