"""How token reduction changes the pictures of a trained text-to-image model: AiluRus and its peers, with their cost.

    python examples/train_text_to_image.py --output run
    python examples/train_text_to_image.py --output run --export shapes
    python -m benchmarks.diffusion.diffusion_quality shapes      # results, tables, and pictures side by side
    python -m benchmarks.diffusion.diffusion_quality shapes --prompts 4 --methods plain "keys 0.25"
    python -m benchmarks.diffusion.diffusion_quality shapes-sd3  # a transformer, of --network sd3
    python -m benchmarks.diffusion.diffusion_quality examples/assets/shapes-sd3 --output pictures  # the shipped one
    python -m benchmarks.diffusion.diffusion_quality shapes --methods plain "blocks of each stack 0.25" --full-every 2 3

Each method's pictures are compared with those of the unreduced model from the same seeds (the mean of each picture's
PSNR, the PSNR of all their pixels, which the one picture decides that changes most, and SSIM), and read by the rules of
examples/shape_scenes.py: the share of the captions' facts that they show and, with the ControlNet of the folder, how
well their edges are the wanted ones. LPIPS is left out: its networks are downloads.

Intervals of 95 % are by bootstrap over the prompts, each with all its seeds; a method shows more or fewer facts than
the unreduced model where the interval of the difference leaves out 0 (harness/bootstrap.py).

The methods' names are explained in methods/diffusion.py and methods/diffusion_peers.py. FLOPs (matrix products and
convolutions, as torch counts them) and time are of whole generations without the autoencoder's decoder, of one picture
with guidance.
The UNet's levels of 32 x 32 and 16 x 16 tokens are reduced, its 8 x 8 are not, by any method; the transformer has
16 x 16 tokens.
"""

from __future__ import annotations

import argparse
import json
import logging
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, DiffusionPipeline, StableDiffusionControlNetPipeline
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from ailurus_hf.video.measures import psnr, ssim
from examples.shape_scenes import draw, edge_adherence, edges, random_scene, read

from ..harness import environment, interleaved, log, markdown, measured_columns, model_flops, save, switched
from ..harness.bootstrap import called, drawn_weights, interval, resampled_scores
from ..methods.diffusion import (
    METHODS,
    METHODS_OF_TRANSFORMERS,
    TOMESD,
    add_full_every,
    add_inner_every,
    is_ours,
    method_of_any,
    switch_on,
    with_full_steps,
)

# Two levels of the model have at least as many tokens.
MIN_TOKENS = 256
GUIDANCE = 3.0
TASKS = ("text", "control")
RESAMPLES = 2000


COLUMNS = {
    "method": "method",
    "psnr": "PSNR|{:.2f} dB",
    "psnr_of_all": "of all pixels|{:.2f} dB",
    "psnr_between": "PSNR, 95 %|{0[0]:.2f} to {0[1]:.2f}",
    "ssim": "SSIM|{:.4f}",
    "ssim_between": "SSIM, 95 %|{0[0]:.4f} to {0[1]:.4f}",
    "facts": "facts of the caption|{:.1%}",
    "facts_between": "facts, 95 %|{0[0]:.1%} to {0[1]:.1%}",
    "facts_are": "than plain's",
    "edges": "edges|{:.3f}",
    "gflops": "a step|{:.3f} GFLOPs",
    "fewer_flops": "fewer FLOPs|{:.2f}×",
    "ms": "a step|{:.1f} ms",
    "speed_up": "speed-up|{:.2f}×",
}
AGAINST = {
    "method": "tomesd",
    "psnr": "PSNR|{:.2f} dB",
    "fewer_flops": "fewer FLOPs|{:.2f}×",
    "by_flops": "ours, of no more FLOPs",
    "by_flops_psnr": "PSNR|{:+.2f} dB",
    "by_flops_psnr_of_all": "of all pixels|{:+.2f} dB",
    "full_size": "SD 1.5|{:.2f}×",
    "by_speed": "ours, no slower there",
    "by_speed_psnr": "PSNR|{:+.2f} dB",
    "by_speed_psnr_of_all": "of all pixels|{:+.2f} dB",
}


class Scenes:
    """Scenes to be drawn by a pipeline: each prompt from each seed. Scenes are others than those of the training.

    The jobs are by seeds, and the prompts of each seed in one order.
    """

    def __init__(self, pipe: Any, prompts: int, seeds: int, steps: int, batch_size: int = 8) -> None:
        self.pipe, self.prompts, self.steps, self.batch_size = pipe, prompts, steps, batch_size
        self.controlled = hasattr(pipe, "controlnet")
        rng = np.random.default_rng(2**32)
        scenes = [random_scene(rng) for _ in range(prompts)]
        self.jobs = [(scene, seed * prompts + n) for seed in range(seeds) for n, scene in enumerate(scenes)]
        self.edges = {id(scene): edges(draw(scene)[1]) for scene in scenes}

    def generate(self, jobs: list, output_type: str) -> Tensor:
        """Pictures Tensor[B, 3, H, W] from 0 to 1, or their latents."""
        # The transformer was trained without tokens for a third text encoder (examples/shape_models.py).
        inputs: dict[str, Any] = {"max_sequence_length": 0} if hasattr(self.pipe, "text_encoder_3") else {}
        if self.controlled:
            lines = torch.stack([self.edges[id(scene)] for scene, _ in jobs])
            inputs = {"image": lines[:, None].repeat(1, 3, 1, 1).float()}
        result: Tensor = self.pipe(
            [scene.caption for scene, _ in jobs],
            **inputs,
            num_inference_steps=self.steps,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(seed) for _, seed in jobs],
            output_type=output_type,
        ).images
        return result

    def pictures(self) -> Tensor:
        starts = range(0, len(self.jobs), self.batch_size)
        return torch.cat([self.generate(self.jobs[start : start + self.batch_size], "pt") for start in starts]).float()

    def scores(self, pictures: Tensor, plain: Tensor) -> tuple[dict[str, float | None], np.ndarray]:
        """PSNR and SSIM of ailurus_hf/video/measures.py, equal pictures at 100 dB; means of the others.

        Also what they are made of, summed over a prompt's seeds: pictures, PSNR, SSIM, facts shown and facts in all,
        [prompts, 5].
        """
        both = [image_of(picture) for picture in pictures], [image_of(picture) for picture in plain]
        counts = []
        for (scene, _), picture, a, b in zip(self.jobs, pictures, *both, strict=True):
            facts = read(picture, scene).values()
            counts.append((1, min(psnr([a], [b]), 100.0), ssim([a], [b]), sum(facts), len(facts)))
        of_prompts = np.array(counts, dtype=float).reshape(-1, self.prompts, 5).sum(0)
        scores: dict[str, float | None] = {
            **{name: score(of_prompts.sum(0)) for name, score in SCORES.items()},
            "psnr_of_all": min(psnr(*both), 100.0),
            "edges": None,
        }
        if self.controlled:
            found = [edge_adherence(p, self.edges[id(s)]) for (s, _), p in zip(self.jobs, pictures, strict=True)]
            scores["edges"] = float(np.mean(found))
        return scores, of_prompts


# From sums of what `Scenes.scores` counts.
SCORES: dict[str, Callable[[np.ndarray], float]] = {
    "psnr": lambda sums: float(sums[1] / sums[0]),
    "ssim": lambda sums: float(sums[2] / sums[0]),
    "facts": lambda sums: float(sums[3] / sums[4]),
}


def intervals(counts: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Of each method by name, what its scores lie between, and whether it shows more or fewer facts than plain.

    counts: [prompts, 5] of each method; all are compared on the same draws.
    """
    weights = drawn_weights(len(counts["plain"]), RESAMPLES, np.random.default_rng(0))
    found: dict[str, dict[str, Any]] = {}
    plain = resampled_scores(counts["plain"], weights, SCORES["facts"])
    for name, of_prompts in counts.items():
        values = {score: resampled_scores(of_prompts, weights, of) for score, of in SCORES.items()}
        found[name] = {f"{score}_between": interval(each) for score, each in values.items()}
        more = interval(values["facts"] - plain)
        found[name] |= {"facts_more_between": more, "facts_are": called(more, "more", "fewer")}
    return found


def image_of(picture: Tensor) -> Image.Image:
    """Tensor[3, H, W] from 0 to 1 in 8-bit colors."""
    return Image.fromarray((255 * picture.clamp(0, 1)).round().byte().permute(1, 2, 0).numpy())


def switched_on(name: str, pipe: Any) -> AbstractContextManager:
    config = pipe.transformer.config if hasattr(pipe, "transformer") else pipe.unet.config
    tokens = (config.sample_size // config.get("patch_size", 1)) ** 2
    return switched(lambda: switch_on(name, pipe, tokens, min_tokens=MIN_TOKENS))


@torch.inference_mode()
def measure(task: Scenes, methods: list[str], repeats: int) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """One row a method, plain first, and the pictures of each."""
    methods = ["plain", *(name for name in methods if name != "plain")]
    pictures: dict[str, Tensor] = {}
    counts: dict[str, np.ndarray] = {}
    rows: dict[str, dict[str, Any]] = {}
    one = lambda number: task.generate([task.jobs[number % len(task.jobs)]], "latent")  # noqa: E731
    for name in tqdm(methods, desc="pictures", disable=None):
        with switched_on(name, task.pipe):
            pictures[name] = task.pictures()
            one(0)  # tables of the grids are made once, and are no part of a step
            flops = model_flops(lambda: one(0)) / task.steps
        scores, counts[name] = task.scores(pictures[name], pictures["plain"])
        rows[name] = {"method": name, **scores, "gflops": flops / 1e9}
    for name, between in intervals(counts).items():
        rows[name] |= between
    # The unreduced model is not compared with itself.
    compared = ("psnr", "psnr_of_all", "psnr_between", "ssim", "ssim_between", "facts_more_between", "facts_are")
    rows["plain"] |= dict.fromkeys(compared)
    for row in rows.values():
        row["fewer_flops"] = rows["plain"]["gflops"] / row["gflops"]
    if repeats:
        seconds = interleaved(
            dict.fromkeys(methods, one), repeats, warmup=1, around=lambda name: switched_on(name, task.pipe)
        )
        for name, row in rows.items():
            row["ms"], row["speed_up"] = 1e3 * seconds[name] / task.steps, seconds["plain"] / seconds[name]
    return list(rows.values()), pictures


def speeds_of(result: dict[str, Any], size: int = 512) -> dict[str, float]:
    """The speed-up of each method in a result of benchmarks.diffusion.diffusion_speed."""
    return {row["method"]: row["speed_up"] for row in result["rows"] if row["size"] == size}


def against_tomesd(rows: list[dict[str, Any]], full_size: Mapping[str, float]) -> list[dict[str, Any]]:
    """For each setting of tomesd the setting of ours nearest to the plain pictures of those that cost no more."""
    return against(list(TOMESD), rows, full_size)


def against(others: Sequence[str], rows: list[dict[str, Any]], full_size: Mapping[str, float]) -> list[dict[str, Any]]:
    """For each of the others the setting of ours nearest to the plain pictures of those that cost no more.

    full_size: speed-ups of a network of full size, since steps of this small one are too short to be timed.
    """
    costs = {
        "by_flops": {row["method"]: row["gflops"] for row in rows},
        "by_speed": {name: 1 / speed_up for name, speed_up in full_size.items()},
    }
    of_ours = [row for row in rows if is_ours(row["method"])]
    compared = []
    for row in rows:
        name = row["method"]
        if name not in others:
            continue
        found = {"method": name, "psnr": row["psnr"], "fewer_flops": row["fewer_flops"]}
        found["full_size"] = full_size.get(name)
        for key, cost in costs.items():
            known = [other for other in of_ours if other["method"] in cost and name in cost]
            cheaper = [other for other in known if cost[other["method"]] <= cost[name]]
            best = max(cheaper, key=lambda other: other["psnr"], default=None)
            found[key] = None if best is None else best["method"]
            for score in ("psnr", "psnr_of_all"):
                found[f"{key}_{score}"] = None if best is None else best[score] - row[score]
        compared.append(found)
    return compared


def sheet(task: Scenes, pictures: dict[str, Tensor], methods: list[str], rows: int = 6) -> Image.Image:
    """Pictures side by side: a row a prompt, a column a method, the edges first where there are any."""
    side, head, left = pictures["plain"].shape[-1], 56, 4
    columns = [(name, pictures[name]) for name in methods]
    if task.controlled:
        wanted = torch.stack([task.edges[id(scene)] for scene, _ in task.jobs])
        columns.insert(0, ("edges", wanted[:, None].expand(-1, 3, -1, -1).float()))
    rows = min(rows, len(task.jobs))
    page = Image.new("RGB", (len(columns) * (side + left) - left, head + rows * (side + 18)), "white")
    pen = ImageDraw.Draw(page)
    for column, (name, made) in enumerate(columns):
        pen.multiline_text((column * (side + left), 2), "\n".join(textwrap.wrap(name, side // 6)), fill="black")
        for row in range(rows):
            page.paste(image_of(made[row]), (column * (side + left), head + row * (side + 18)))
    for row in range(rows):
        pen.text((0, head + row * (side + 18) + side + 2), task.jobs[row][0].caption, fill="black")
    return page


def load(folder: str, controlled: bool) -> Any:
    """The pipeline of a folder, in float32."""
    if controlled:
        controlnet = ControlNetModel.from_pretrained(Path(folder) / "controlnet")
        options = {"controlnet": controlnet, "safety_checker": None, "requires_safety_checker": False}
        pipe: Any = StableDiffusionControlNetPipeline.from_pretrained(folder, **options)
    else:
        # Of three, SD3's loader wants to be told that it has no third text encoder.
        none = ("text_encoder_3", "tokenizer_3") if (Path(folder) / "transformer").exists() else ()
        pipe = DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(none))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder that examples/train_text_to_image.py --export wrote")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--repeats", type=int, default=5, help="of whole generations, for the time of a step; 0: not timed"
    )
    parser.add_argument(
        "--methods", nargs="+", type=method_of_any, metavar="METHOD", help="default: all for the network"
    )
    add_full_every(parser)
    add_inner_every(parser)
    parser.add_argument(
        "--shown",
        nargs="+",
        default=[
            "plain",
            "keys 0.125 at full size",
            "tomesd 0.75, max_downsample 1",
            "keys 0.0625 at full size, blocks 0.35 at half, halves apart",
            "tomesd 0.5, max_downsample 2, all",
            "keys 0.03125 at full size, merged projections 0.2 at half, halves apart",
            "tomesd 0.75, max_downsample 2, all",
            "blocks of each stack 0.25",
            "DeepCache 3",
            "ToMA 0.5",
            "ClusCa 3",
            "FirstBlockCache 0.1",
            "blocks 0.5 after layer 1",
            "blocks 0.25 after layer 1",
        ],
        type=method_of_any,
        metavar="METHOD",
        help="methods of the picture, of those measured",
    )
    parser.add_argument(
        "--speeds",
        type=Path,
        help="a result of benchmarks.diffusion.diffusion_speed at 512, for what is no slower than tomesd",
    )
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, help="from text, from text and edges (default: what the folder can do)"
    )
    parser.add_argument("--output", type=Path, help="folder of the pictures (default: beside the model's)")
    parser.add_argument("--name", default="", help="ends the names of the result and of the pictures")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = Path(args.model)
    output = args.output or folder.parent
    output.mkdir(parents=True, exist_ok=True)
    speeds = speeds_of(json.loads(args.speeds.read_text())) if args.speeds else {}
    about = {"prompts": args.prompts, "seeds": args.seeds, "steps": args.steps}
    is_transformer = (folder / "transformer").exists()
    methods = args.methods or list(METHODS_OF_TRANSFORMERS if is_transformer else METHODS)
    for name in args.tasks or [task for task in TASKS if task == "text" or (folder / "controlnet").exists()]:
        controlled = name == "control"
        task = Scenes(load(args.model, controlled), args.prompts, args.seeds, args.steps)
        measured, pictures = measure(task, with_full_steps(methods, args.full_every, args.inner_every), args.repeats)
        ending = f"_{args.name}" if args.name else ""
        path = output / f"{folder.name}-{name}-reduced{ending}.png"
        sheet(task, pictures, [method for method in args.shown if method in pictures]).save(path)
        log.info("wrote %s", path)
        others = [method for method in methods if method != "plain" and not is_ours(method)]
        compared = markdown(against(others, measured, speeds), {**AGAINST, "method": "peer"})
        print(f"\n{name}\n\n{measured_columns(measured, COLUMNS)}\n\n{compared}")
        kind = "sd3_" * is_transformer
        save(f"diffusion_quality_{kind}{name}{ending}", measured, {**environment(torch.device("cpu"), "fp32"), **about})


if __name__ == "__main__":
    main()
