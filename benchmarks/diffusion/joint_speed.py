"""Transformers of SD3, Flux and Wan: FLOPs of whole networks, and one step of a few of their layers.

    python -m benchmarks.diffusion.joint_speed --flops                       # whole networks, counted, nothing computed
    python -m benchmarks.diffusion.joint_speed --model flux --size 1024      # a few layers of the true width, fp32, CPU
    python -m benchmarks.diffusion.joint_speed --model flux --layers 57 --device cuda --dtype bf16

Random weights. Layers of a network cost alike, so a few tell the speed-up of all but for the clustering, which is done
once: its share is overstated. Of a few, all are reduced; of whole networks, those from `cluster_location` on. "layers"
says how many there were.
"""

from __future__ import annotations

import argparse
import logging
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, WanTransformer3DModel
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from ailurus_hf import ailurus_enabled, ailurus_status, apply_ailurus, remove_ailurus
from ailurus_hf.diffusion.apply import reducers_of

from ..harness import DTYPES, environment, interleaved, log, markdown, model_flops, save

# As published. SD3.5-medium has a second attention in its first 13 layers.
SD3 = {"sample_size": 128, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
MODELS: dict[str, tuple[type[nn.Module], dict[str, Any], int]] = {
    "sd3": (SD3Transformer2DModel, SD3, 24),
    "sd35": (SD3Transformer2DModel, {**SD3, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))}, 24),
    "flux": (FluxTransformer2DModel, {"guidance_embeds": True}, 57),
    "wan-1.3b": (WanTransformer3DModel, {"num_attention_heads": 12, "ffn_dim": 8960}, 30),
    "wan-14b": (WanTransformer3DModel, {}, 40),
}
TEXT = {"sd3": 333, "sd35": 333, "flux": 512, "wan-1.3b": 512, "wan-14b": 512}
# Latents of 81 frames, at 480 x 832 (times size / 1024).
WAN_LATENTS = (21, 60, 104)
KEEPS = (0.5, 0.25)
METHODS: dict[str, dict[str, Any]] = {
    f"{scope} {keep}": {"scope": scope, "keep_ratio": keep} for scope in ("blocks", "attention") for keep in KEEPS
}
COLUMNS = {
    "model": "model",
    "tokens": "tokens|{}",
    "layers": "layers|{}",
    "method": "method",
    "tflops": "step|{:.2f} TFLOP",
    "ms": "step|{:.0f} ms",
    "speed_up": "speed-up|{:.2f}×",
    "ideal": "FLOPs-ideal|{:.2f}×",
    "share_of_ideal": "share|{:.3f}",
    "cosine": "cosine|{:.3f}",
}


def make(model: str, layers: int, device: torch.device, dtype: torch.dtype) -> Any:
    """A network of the true width and so many layers; Flux has two single-stream ones for each double-stream one."""
    kind, fields, _ = MODELS[model]
    depth = {"num_layers": layers}
    if kind is FluxTransformer2DModel:
        double = max(1, layers // 3)
        depth = {"num_layers": double, "num_single_layers": layers - double}
    elif "dual_attention_layers" in fields:
        fields = {**fields, "dual_attention_layers": tuple(range(-(-layers * 13 // 24)))}
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return kind(**{**fields, **depth}).eval()
    finally:
        torch.set_default_dtype(before)


def inputs(
    network: Any, model: str, size: int, device: torch.device, dtype: torch.dtype, number: int = 0
) -> dict[str, Any]:
    """Arguments of one step for a picture (or video, see WAN_LATENTS) of a size in pixels."""
    generator = torch.Generator().manual_seed(number)

    def normal(*shape: int) -> Tensor:
        if device.type == "meta":
            return torch.empty(shape, device=device, dtype=dtype)
        return torch.randn(shape, generator=generator).to(device, dtype)

    side = size // 16
    made: dict[str, Any] = {"timestep": torch.full((1,), 0.5, device=device), "return_dict": False}
    made["encoder_hidden_states"] = normal(1, TEXT[model], 4096)
    if model.startswith("wan"):
        frames, height, width = WAN_LATENTS
        made["hidden_states"] = normal(1, 16, frames, height * size // 1024, width * size // 1024)
        return made
    made["pooled_projections"] = normal(1, network.config.pooled_projection_dim)
    if model != "flux":
        made["hidden_states"] = normal(1, 16, 2 * side, 2 * side)
        return made
    along = torch.arange(float(side))
    ids = torch.cartesian_prod(torch.zeros(1), along, along).to(device)
    made |= {"img_ids": ids, "txt_ids": torch.zeros(TEXT[model], 3, device=device)}
    return {**made, "hidden_states": normal(1, side**2, 64), "guidance": torch.ones(1, device=device)}


def num_tokens(arguments: dict[str, Any], model: str) -> int:
    hidden_states = arguments["hidden_states"]
    return hidden_states.shape[1] if model == "flux" else hidden_states[0, 0].numel() // 4


def whole_networks(models: list[str], sizes: list[int]) -> list[dict[str, Any]]:
    """FLOPs of one step, and by how much fewer they are: the speed-up that they allow."""
    rows, meta = [], torch.device("meta")
    for model in models:
        layers = MODELS[model][2]
        network = make(model, layers, meta, torch.float32)
        for size in sizes:
            arguments = inputs(network, model, size, meta, torch.float32)
            full, tokens = model_flops(partial(network, **arguments)), num_tokens(arguments, model)
            for method, fields in METHODS.items():
                reducer = reducers_of(apply_ailurus(network, **fields))[0][1]
                kept = reducer.config.clusters_for(tokens, 2)
                others = kept if reducer.config.scope == "blocks" else tokens
                saved = sum(
                    reducer.declared.flops(block, tokens, tokens, tokens, 1, TEXT[model])
                    - reducer.declared.flops(block, kept, kept, others, 1, TEXT[model])
                    for block in reducer.stacks[0].blocks[reducer.config.cluster_location :]
                )
                remove_ailurus(network)
                about = {"model": model, "tokens": tokens, "layers": layers, "method": method}
                rows.append({**about, "tflops": full / 1e12, "ideal": full / (full - saved)})
    return rows


@torch.inference_mode()
def measure(
    network: Any, model: str, size: int, layers: int, repeats: int, device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """One row a method; each is on during its own turn only."""
    steps = [inputs(network, model, size, device, dtype, number) for number in range(2)]
    meta = make(model, layers, torch.device("meta"), torch.float32)
    whole = inputs(meta, model, size, torch.device("meta"), torch.float32)
    full, rows, plain = model_flops(partial(meta, **whole)), {}, None

    # Of a few layers a whole one would weigh too much.
    start = {} if layers == MODELS[model][2] else {"cluster_location": 0}

    def switched_on(name: str) -> AbstractContextManager:
        return ailurus_enabled(network, **({**METHODS[name], **start} if name in METHODS else {}))

    for name in ("plain", *METHODS):
        with switched_on(name):
            output = network(**steps[0])[0].float().flatten()
            plain = output if plain is None else plain
            about = {"model": model, "tokens": num_tokens(steps[0], model), "layers": layers, "method": name}
            rows[name] = {**about, "cosine": cosine_similarity(output, plain, 0).item()}
            if (status := ailurus_status(network)).active:
                rows[name]["ideal"] = full / (full - status.saved_flops)
    contenders = {name: lambda number: network(**steps[number % 2]) for name in rows}
    seconds = interleaved(contenders, repeats, warmup=1, device=device, around=switched_on)
    for name, row in rows.items():
        row["ms"], row["speed_up"] = 1e3 * seconds[name], seconds["plain"] / seconds[name]
        if "ideal" in row:
            row["share_of_ideal"] = row["speed_up"] / row["ideal"]
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--size", nargs="+", type=int, default=[1024], help="picture sides in pixels, multiples of 64")
    parser.add_argument("--flops", action="store_true", help="count whole networks, compute nothing")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--device", default="cpu", type=torch.device)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.flops:
        rows = whole_networks(args.model, args.size)
        save("joint_flops", rows, environment(torch.device("cpu"), "fp32"))
    else:
        rows = []
        for model in args.model:
            network = make(model, args.layers, args.device, DTYPES[args.dtype])
            for size in args.size:
                rows += measure(network, model, size, args.layers, args.repeats, args.device, DTYPES[args.dtype])
                log.info(markdown(rows[-1 - len(METHODS) :], COLUMNS))
        save("joint_speed", rows, environment(args.device, args.dtype))
    print(markdown(rows, COLUMNS))


if __name__ == "__main__":
    main()
