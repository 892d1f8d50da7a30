"""Whole videos by ControlVideo: plain, the presets and full steps (`full_every`) in turns, with their content beside.

    python -m benchmarks.video.controlvideo_generations --frames 8 --size 256 --steps 20 --repeats 1
    python -m benchmarks.video.controlvideo_generations --tiny     # a dry run in seconds, saves nothing

Geometry of Stable Diffusion 1.5 with its ControlNet, all steps under guidance and the decoding. Time and FLOPs, which
torch counts over all steps, do not depend on weights; these are random. Content does: warping error along the motion of
the input clip, and its edges (F1), are of pictures without a subject here, so `video_quality` measures them on a
trained model. Both are held against plain's: `CONTENT` is how far off they may be.

At 256² the largest grid has 1024 tokens a frame, and only that one is reduced unless a method says "from 256 tokens".
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ailurus_hf.pipelines import ControlVideoPipeline
from ailurus_hf.presets import DIFFUSION_PRESETS
from ailurus_hf.video import edge_agreement, load_condition, psnr, warping_error

from ..harness import DTYPES, environment, interleaved, log, markdown, model_flops, save, switched
from .controlvideo_speed import FACTOR, VAE, Switch, inputs, make_pipeline, ours, video_of

# By how much of plain's warping error and edges may differ.
CONTENT = 0.05


def presets_and_full_steps(**fields: Any) -> dict[str, Switch]:
    """Methods that differ over the steps of a generation. fields: of all of them."""
    blocks: dict[str, Any] = {"keep_ratio": 0.25}
    drawn_on = {"full_every": 4, "extrapolate": True}
    return {
        **{f"preset {name}": ours(**{**preset, **fields}) for name, preset in DIFFUSION_PRESETS.items()},
        **{f"each 0.25, full_every {every}": ours(**blocks, **fields, full_every=every) for every in (2, 3, 5)},
        "each 0.25, full_every 4, extrapolated": ours(**blocks, **fields, **drawn_on),
        "joint 0.25, full_every 3": ours(**blocks, **fields, full_every=3, frames="joint"),
        "each 0.125, full_every 3": ours(**{**blocks, "keep_ratio": 0.125}, **fields, full_every=3),
    }


METHODS: dict[str, Switch] = {
    "plain": lambda pipe, frames, latent_tokens: lambda: None,
    **presets_and_full_steps(),
    **{f"{name}, from 256 tokens": way for name, way in presets_and_full_steps(min_tokens=256).items()},
}
DEFAULT = (
    "plain",
    "preset fast",
    "preset fast, from 256 tokens",
    "each 0.25, full_every 3, from 256 tokens",
    "each 0.25, full_every 5, from 256 tokens",
)
COLUMNS = {
    "frames": "frames",
    "size": "image|{}²",
    "steps": "steps",
    "method": "method",
    "seconds": "a video|{:.1f} s",
    "speed_up": "speed-up|{:.2f}×",
    "fewer_flops": "fewer FLOPs|{:.2f}×",
    "psnr": "PSNR to plain|{:.2f} dB",
    "warping": "warping error|{:.2f}·10⁻³",
    "warping_of_plain": "of plain's|{:.1%}",
    "edges": "edges|{:.3f}",
    "edges_of_plain": "of plain's|{:.1%}",
    "content": "content within 5 %",
}
TINY_BLOCKS: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
}
TINY: dict[str, dict[str, Any]] = {
    "unet": {**TINY_BLOCKS, "sample_size": 32, "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
    "controlnet": {**TINY_BLOCKS, "conditioning_embedding_out_channels": (4, 8, 8, 8)},
    "vae": {**VAE, "block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 4},
}


def beside_plain(rows: list[dict[str, Any]]) -> None:
    """Adds to each row how its warping error and edges stand to the first one's, plain's."""
    for row in rows:
        for name in ("warping", "edges"):
            row[f"{name}_of_plain"] = row[name] / rows[0][name] if rows[0][name] else None
        ratios = [row[f"{name}_of_plain"] for name in ("warping", "edges")]
        row["content"] = "yes" if all(r is not None and abs(r - 1) <= CONTENT for r in ratios) else "no"


def pictures(frames: Tensor) -> list[Image.Image]:
    """Of Tensor[F, 3, H, W] in [0, 1]."""
    pixels = (255 * frames.float().clamp(0, 1)).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(each) for each in pixels]


def content(video: Tensor, plain: Tensor, clip: Tensor) -> dict[str, float | None]:
    """How far a video is from plain's, how steady along the clip's motion, and how well it keeps to its edges."""
    frames, moving, canny = pictures(video), pictures(clip), load_condition("canny")
    return {
        "psnr": None if video is plain else min(psnr(frames, pictures(plain)), 100.0),
        "warping": 1e3 * warping_error(frames, moving),
        "edges": edge_agreement(frames, [canny(frame) for frame in moving]),
    }


@torch.inference_mode()
def measure(
    pipe: ControlVideoPipeline,
    frames: int,
    size: int,
    methods: Mapping[str, Switch],
    steps: int,
    repeats: int,
) -> list[dict[str, Any]]:
    """One row a method, plain first; each is on during its own turns only. repeats: timed videos of each."""
    given = [inputs(pipe, frames, size, number) for number in range(2)]
    latent_tokens = (size // FACTOR) ** 2
    rows: list[dict[str, Any]] = []
    plain: Tensor | None = None
    # The first video of each is counted and looked at, and warms up.
    for name, on in tqdm(methods.items(), desc="FLOPs and content", disable=None):
        made: list[Tensor] = []
        with switched(lambda on=on: on(pipe, frames, latent_tokens)):
            flops = model_flops(lambda made=made: made.append(video_of(pipe, given[0], steps)))
        plain = made[0] if plain is None else plain
        about = {"frames": frames, "size": size, "steps": steps, "method": name, "tflops": flops / 1e12}
        rows.append({**about, **content(made[0], plain, given[0]["clip"])})
    seconds = interleaved(
        dict.fromkeys(methods, lambda number: video_of(pipe, given[number % 2], steps)),
        repeats,
        warmup=0,
        device=pipe.unet.device,
        around=lambda name: switched(lambda: methods[name](pipe, frames, latent_tokens)),
        progress=lambda rounds: tqdm(rounds, desc="rounds", disable=None),
    )
    for row in rows:
        row["seconds"] = seconds[row["method"]]
        row["speed_up"] = seconds["plain"] / row["seconds"]
        row["fewer_flops"] = rows[0]["tflops"] / row["tflops"]
    beside_plain(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--size", type=int, default=256, help="of a side in pixels (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of a video (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed videos of each (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", default=DEFAULT, choices=METHODS, metavar="METHOD", help="plain is one")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own")
    parser.add_argument("--tiny", action="store_true", help="a dry run on tiny networks; saves nothing")
    parser.add_argument("--name", default="controlvideo_generations_sd15", help="of the result file")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.threads:
        torch.set_num_threads(args.threads)
    methods = {name: METHODS[name] for name in dict.fromkeys(("plain", *args.methods))}
    if args.tiny:
        print(markdown(measure(make_pipeline(args.device, **TINY), 2, 256, methods, 4, 1), COLUMNS))
        return
    pipe = make_pipeline(args.device, DTYPES[args.dtype], vae=VAE)
    rows = measure(pipe, args.frames, args.size, methods, args.steps, args.repeats)
    log.info("wrote %s", save(args.name, rows, environment(args.device, args.dtype)))
    print(markdown(rows, COLUMNS))


if __name__ == "__main__":
    main()
