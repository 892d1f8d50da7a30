"""How token reduction changes the videos of a trained model: AiluRus by frame or over space and time, tomesd, VidToMe.

    python examples/train_text_to_image.py --output run
    python examples/train_text_to_image.py --output run --export shapes
    python -m benchmarks.video.video_quality shapes        # shapes that move over a still ground
    python -m benchmarks.video.video_quality shapes --videos walk.mp4 duck.mp4     # and along the edges of real clips

ControlVideoPipeline draws each clip from its edges and a prompt, plain and reduced, from the same noise. Each video is
compared with the plain one (PSNR, SSIM). Its frames, warped along the motion of the clip that it follows, are compared
with one another (warping error: a steady video's is low; plain has its own). Its edges are compared with the wanted
ones (F1), and shapes are read by the rules of examples/shape_scenes.py. Of a real clip the model knows nothing: what it
draws is no likeness, but plain and reduced still differ by the reduction alone.

FLOPs (matrix products and convolutions, as torch counts them) and time are of a whole generation, divided by its steps
of UNet and ControlNet under guidance. The model's levels of 32 x 32 and 16 x 16 tokens a frame are reduced, its
8 x 8 are not, by any method.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from tqdm import tqdm

from ailurus_hf.pipelines import ControlVideoPipeline
from ailurus_hf.video import edge_agreement, load_condition, open_clip, psnr, ssim, warping_error, write_video
from ailurus_hf.visualization import side_by_side
from examples.shape_scenes import SIDE, Scene, draw, edge_adherence, edges, random_scene, read

from ..harness import environment, interleaved, log, markdown, model_flops, save, switched
from .controlvideo_generations import beside_plain, presets_and_full_steps
from .controlvideo_speed import Switch, by_resolution, ours, vidtome, with_tomesd

Video = list[Image.Image]

# Two levels of the model have at least as many tokens a frame.
MIN_TOKENS = 256
GUIDANCE = 3.0
# How far from its position a thing begins and ends, in pixels.
SWAY = 10
# Of real clips: one that the model can draw, whatever the edges are.
PROMPT = "large yellow circle middle on teal paper"

METHODS: dict[str, Switch] = {
    "plain": lambda pipe, frames, latent_tokens: lambda: None,
    "tomesd 0.5": with_tomesd(ratio=0.5, max_downsample=2),
    "tomesd 0.75, all": with_tomesd(ratio=0.75, max_downsample=2, merge_crossattn=True, merge_mlp=True),
    "VidToMe": vidtome,
    **{
        f"{way} {keep}": by_resolution(keep_ratio=keep, frames=way, min_tokens=MIN_TOKENS)
        for keep in (0.5, 0.25, 0.125)
        for way in ("each", "joint")
    },
    **{
        f"{way} 0.25, {name}": by_resolution(keep_ratio=0.25, frames=way, min_tokens=MIN_TOKENS, **fields)
        for name, fields in {
            "every 4 steps": {"refresh_every": 4},
            "first 2 steps whole": {"unreduced_first_steps": 2},
            "merged projections": {"projections": "merged"},
            "attention": {"scope": "attention"},
        }.items()
        for way in ("each", "joint")
    },
    **{
        f"{way} 0.25, each stack": ours(keep_ratio=0.25, frames=way, min_tokens=MIN_TOKENS) for way in ("each", "joint")
    },
    **{
        f"{way}, keys {keys} at full size, blocks 0.25 at half": ours(
            keep_ratio={1: keys, 2: 0.25},
            levels={1: {"scope": "attention", "reduce": "kv"}},
            frames=way,
            min_tokens=MIN_TOKENS,
        )
        for way in ("each", "joint")
        for keys in (0.125, 0.0625)
    },
    **presets_and_full_steps(min_tokens=MIN_TOKENS),
}
SHOWN = ("plain", "preset fast", "each 0.25", "joint 0.25", "tomesd 0.75, all", "VidToMe")
COLUMNS = {
    "clips": "clips",
    "method": "method",
    "psnr": "PSNR|{:.2f} dB",
    "ssim": "SSIM|{:.4f}",
    "warping": "warping error|{:.2f}·10⁻³",
    "warping_of_plain": "of plain's|{:.1%}",
    "edges": "edges|{:.3f}",
    "edges_of_plain": "of plain's|{:.1%}",
    "content": "content within 5 %",
    "facts": "facts of the caption|{:.1%}",
    "gflops": "a step|{:.1f} GFLOPs",
    "fewer_flops": "fewer FLOPs|{:.2f}×",
    "seconds": "a step|{:.2f} s",
    "speed_up": "speed-up|{:.2f}×",
}


@dataclass(frozen=True)
class Redrawn:
    """What is drawn anew. kind: under what its scores are averaged. conditions: Tensor[F, 3, H, W] in [0, 1].

    adherence: how well the edges of a video are the wanted ones. facts: which of its caption's a video of shapes shows.
    """

    kind: str
    prompt: str
    frames: Video
    conditions: Tensor
    adherence: Callable[[Video], float]
    facts: Callable[[Video], list[bool]] | None = None


def moving_shapes(rng: np.random.Generator, count: int) -> Redrawn:
    """A scene whose things move past their positions, two of them in opposite directions, over a still ground."""
    scene = random_scene(rng)
    # Away from the side that a position is named after there is room in both directions.
    across = np.array([0, 1] if scene.things[0].position in ("left", "right") else [1, 0])
    way = across * rng.choice((-1, 1))
    moves = [
        [(sign * at * way).round().astype(int) for sign in (1, -1)[: len(scene.things)]]
        for at in np.linspace(-SWAY, SWAY, count)
    ]
    drawn = [draw(moved(scene, move)) for move in moves]
    masks = [edges(mask) for _, mask in drawn]
    return Redrawn(
        kind="shapes",
        prompt=scene.caption,
        frames=[picture_of(pixels) for pixels, _ in drawn],
        conditions=torch.stack(masks)[:, None].repeat(1, 3, 1, 1).float(),
        adherence=lambda video: float(np.mean([edge_adherence(pixels_of(f), m) for f, m in zip(video, masks)])),
        # They stay near enough to their positions to be read there.
        facts=lambda video: [shown for frame in video for shown in read(pixels_of(frame), scene).values()],
    )


def moved(scene: Scene, moves: Sequence[np.ndarray]) -> Scene:
    """The scene with each of its things moved by as many pixels."""
    things = [replace(t, x=t.x + int(x), y=t.y + int(y)) for t, (x, y) in zip(scene.things, moves, strict=True)]
    return replace(scene, things=tuple(things))


def real_clip(path: str, count: int, every: int, side: int) -> Redrawn:
    """The first frames of a video file, its middle square, and their canny edges."""
    frames = [
        ImageOps.fit(frame, (side, side), Image.Resampling.LANCZOS)
        for frame in open_clip(path, every=every, max_frames=count, min_frames=count)
    ]
    canny = load_condition("canny")
    lines = [canny(frame) for frame in frames]
    return Redrawn(
        kind=Path(path).stem,
        prompt=PROMPT,
        frames=frames,
        conditions=torch.stack([pixels_of(picture) for picture in lines]),
        adherence=lambda video: edge_agreement(video, lines),
    )


def pixels_of(picture: Image.Image) -> Tensor:
    """Tensor[3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def picture_of(pixels: Tensor) -> Image.Image:
    return Image.fromarray((255 * pixels.clamp(0, 1)).round().byte().permute(1, 2, 0).numpy())


def video_of(pipe: ControlVideoPipeline, clip: Redrawn, seed: int, steps: int, output_type: str) -> Any:
    return pipe(
        clip.prompt,
        clip.conditions,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(seed),
        output_type=output_type,
    ).frames


def scores(videos: list[Video], plain: list[Video], clips: list[Redrawn]) -> dict[str, float | None]:
    """Means over clips of one kind; the distance of equal videos is 100 dB."""
    facts = [fact for video, clip in zip(videos, clips) if clip.facts for fact in clip.facts(video)]
    return {
        "psnr": float(np.mean([min(psnr(a, b), 100.0) for a, b in zip(videos, plain, strict=True)])),
        "ssim": float(np.mean([ssim(a, b) for a, b in zip(videos, plain, strict=True)])),
        "warping": 1e3 * float(np.mean([warping_error(video, clip.frames) for video, clip in zip(videos, clips)])),
        "edges": float(np.mean([clip.adherence(video) for video, clip in zip(videos, clips)])),
        "facts": float(np.mean(facts)) if facts else None,
    }


@torch.inference_mode()
def measure(
    pipe: ControlVideoPipeline, clips: list[Redrawn], methods: list[str], steps: int, repeats: int
) -> tuple[list[dict[str, Any]], dict[str, list[Video]]]:
    """One row a kind of clips and method, plain first, and each method's videos. repeats: 0: nothing is timed."""
    methods = ["plain", *(name for name in methods if name != "plain")]
    count, height, width = len(clips[0].frames), *clips[0].conditions.shape[2:]
    latent_tokens = height * width // pipe.vae_scale_factor**2
    videos: dict[str, list[Video]] = {}
    cost: dict[str, dict[str, float]] = {}

    def switched_on(name: str) -> AbstractContextManager:
        return switched(lambda: METHODS[name](pipe, count, latent_tokens))

    def latents(number: int) -> Any:
        return video_of(pipe, clips[number % len(clips)], number, steps, "latent")

    for name in tqdm(methods, desc="videos", disable=None):
        with switched_on(name):
            videos[name] = [video_of(pipe, clip, number, steps, "pil") for number, clip in enumerate(clips)]
            cost[name] = {"gflops": model_flops(lambda: latents(0)) / steps / 1e9}
        cost[name]["fewer_flops"] = cost["plain"]["gflops"] / cost[name]["gflops"]
    if repeats:
        seconds = interleaved(dict.fromkeys(methods, latents), repeats, warmup=1, around=switched_on)
        for name in methods:
            cost[name] |= {"seconds": seconds[name] / steps, "speed_up": seconds["plain"] / seconds[name]}
    rows: list[dict[str, Any]] = []
    for kind in dict.fromkeys(clip.kind for clip in clips):
        numbers = [number for number, clip in enumerate(clips) if clip.kind == kind]
        of_this: list[dict[str, Any]] = []
        plain, of_kind = [videos["plain"][n] for n in numbers], [clips[n] for n in numbers]
        for name in methods:
            found = scores([videos[name][n] for n in numbers], plain, of_kind)
            if name == "plain":
                found |= {"psnr": None, "ssim": None}
            of_this.append({"clips": kind, "number": len(numbers), "method": name, **found, **cost[name]})
        beside_plain(of_this)
        rows += of_this
    return rows, videos


def sheet(clip: Redrawn, videos: dict[str, Video], most: int = 8) -> Image.Image:
    """Frames from left to right: a row for the edges, one for each method."""
    head, (width, height) = 14, clip.frames[0].size
    rows = {"edges": [picture_of(pixels) for pixels in clip.conditions], **videos}
    taken = np.linspace(0, len(clip.frames) - 1, min(most, len(clip.frames))).round().astype(int)
    page = Image.new("RGB", (len(taken) * (width + 2) - 2, len(rows) * (height + head)), "white")
    pen = ImageDraw.Draw(page)
    for row, (name, video) in enumerate(rows.items()):
        pen.text((0, row * (height + head)), name, fill="black")
        for column, frame in enumerate(taken):
            page.paste(video[frame], (column * (width + 2), row * (height + head) + head))
    return page


def load(folder: str) -> ControlVideoPipeline:
    """The pipeline of a folder with its ControlNet, in float32."""
    controlnet = ControlNetModel.from_pretrained(Path(folder) / "controlnet")
    pipe: ControlVideoPipeline = ControlVideoPipeline.from_pretrained(folder, controlnet=controlnet)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder that examples/train_text_to_image.py --export wrote")
    parser.add_argument("--videos", nargs="+", default=[], help="real clips, each a kind of its own")
    parser.add_argument("--every", type=int, default=2, help="frames of real clips: take every n-th")
    parser.add_argument("--clips", type=int, default=8, help="of moving shapes")
    parser.add_argument("--frames", type=int, default=8, help="of each")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5, help="of whole videos, for the time of a step; 0: not timed")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own")
    parser.add_argument("--output", type=Path, help="folder of the pictures (default: where the model is)")
    parser.add_argument("--name", default="video_quality", help="of the result file")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.threads:
        torch.set_num_threads(args.threads)
    rng = np.random.default_rng(2**33)
    clips = [moving_shapes(rng, args.frames) for _ in range(args.clips)]
    clips += [real_clip(path, args.frames, args.every, SIDE) for path in args.videos]
    rows, videos = measure(load(args.model), clips, args.methods, args.steps, args.repeats)
    folder = Path(args.model)
    output = args.output or folder.parent
    output.mkdir(parents=True, exist_ok=True)
    shown = [name for name in SHOWN if name in videos]
    first = {clip.kind: number for number, clip in reversed(list(enumerate(clips)))}
    for kind, number in first.items():
        path = output / f"{folder.name}-{kind}-video"
        sheet(clips[number], {name: videos[name][number] for name in shown}).save(f"{path}.png")
        beside = side_by_side([clips[number].frames, *(videos[name][number] for name in shown)], ("clip", *shown))
        write_video(f"{path}.mp4", beside, 8)
        log.info("wrote %s.png and .mp4", path)
    about = {"frames": args.frames, "steps": args.steps}
    save(args.name, rows, {**environment(torch.device("cpu"), "fp32"), **about})
    print(markdown(rows, COLUMNS))


if __name__ == "__main__":
    main()
