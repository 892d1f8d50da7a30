"""`ailurus-hf video`: a clip's motion and a prompt to a new video by ControlVideo, reduced or compared with plain."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import logging
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..choices import BETWEEN, FRAMES, SCOPES
from ..presets import DIFFUSION_PRESETS
from .arguments import COMPILE_CLUSTERING, add_clustering, add_config, add_model, add_preset, given_clustering, positive

if TYPE_CHECKING:
    from PIL import Image

    from .. import AiluRusDiffusionConfig

DEFAULT_FRAMES = 15  # as ControlVideo
DEFAULT_FPS = 8  # of a folder of pictures, as ControlVideo
CONDITIONS = ("canny", "depth", "openpose", "softedge", "lineart", "normal", "scribble", "none")
AILURUS_FIELDS = (
    "keep_ratio",
    "frames",
    "min_tokens",
    "scope",
    "clustering",
    "compile_clustering",
    "refresh_every",
    "full_every",
    "inner_every",
    "between",
    "extrapolate",
    "unreduced_first_steps",
    "unreduced_last_steps",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--controlnet", required=True, help="ControlNet of the condition: folder or Hub name")
    parser.add_argument("--prompt", required=True, help="what the video shows")
    parser.add_argument("--negative-prompt", help="what it shall not show")
    parser.add_argument("--output", required=True, help=".mp4, .mov, .gif, or a new folder for PNGs")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that is there (default: refuse)")
    parser.add_argument("--compare", action="store_true", help="run plain too: times, PSNR, and both side by side")

    clip = parser.add_argument_group("clip")
    clip.add_argument("--video", required=True, help="video file, GIF, or folder of pictures whose motion is taken")
    clip.add_argument(
        "--frames",
        type=positive,
        metavar="N",
        help=f"the first N (default: {DEFAULT_FRAMES}, or all of a shorter clip)",
    )
    clip.add_argument("--every", type=positive, default=1, metavar="N", help="take every N-th frame")
    clip.add_argument("--fps", type=float, help="frames a second to take and to write (default: as the clip)")
    clip.add_argument("--height", type=positive, help="of the video (default: shorter side as the model was trained)")
    clip.add_argument("--width", type=positive)
    clip.add_argument("--condition", choices=CONDITIONS, default="canny", help="default: %(default)s, without weights")
    clip.add_argument("--canny", type=int, nargs=2, default=(100, 200), metavar=("LOW", "HIGH"), help="its thresholds")
    clip.add_argument("--annotators", help="weights of the other conditions (default: lllyasviel/Annotators)")

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--steps", type=positive, default=50, help="default: %(default)s")
    sampling.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    sampling.add_argument("--guidance-scale", type=float, default=12.5, help="default: %(default)s")
    sampling.add_argument("--controlnet-scale", type=float, default=1.0, help="default: %(default)s")
    sampling.add_argument("--cross-frame", choices=("full", "sparse_causal", "first"), default="full")
    sampling.add_argument(
        "--smooth-steps", type=int, nargs="+", default=(), metavar="I", help="steps after which frames are interpolated"
    )
    sampling.add_argument(
        "--interpolator", metavar="FILE", help="RIFE's flownet.pkl, or a network as .pt2 (default: optical flow)"
    )
    sampling.add_argument("--clip-length", type=positive, metavar="N", help="long videos: key frames, then clips of N")
    sampling.add_argument(
        "--attention-chunk", type=positive, metavar="N", help="frames that attend at once, for memory"
    )

    group = parser.add_argument_group("AiluRus", "default: keep half of the tokens of large grids")
    add_preset(group, DIFFUSION_PRESETS)
    add_config(group)
    add = partial(_add_setting, group)
    add("keep-ratio", type=float, metavar="R", help="share of the tokens to keep, in (0, 1]")
    # --frames says how many there are.
    group.add_argument("--ailurus-frames", choices=FRAMES, help="cluster each frame (default), or over space and time")
    add("min-tokens", type=positive, metavar="N", help="smaller grids run unreduced")
    add("scope", choices=SCOPES, help="reduce whole blocks, or self-attention alone")
    add_clustering(group, "ailurus-")
    add("compile-clustering", **COMPILE_CLUSTERING)
    add("refresh-every", type=positive, metavar="N", help="steps that share an assignment")
    add("full-every", type=positive, metavar="K", help="every K-th step on all tokens; those between build on it")
    add("inner-every", type=positive, metavar="K", help="of a UNet, all layers in every K-th step; else the outermost")
    add("between", choices=BETWEEN, help="with --full-every: what blocks run on in the steps between")
    extrapolated = "with --full-every or --inner-every: what was kept is drawn on in a line through its last two steps"
    add("extrapolate", action="store_true", default=None, help=extrapolated)
    add("unreduced-first-steps", type=int, metavar="N", help="steps on all tokens at the beginning")
    add("unreduced-last-steps", type=int, metavar="N", help="steps on all tokens at the end")
    group.add_argument("--no-ailurus", action="store_true", help="run the pipeline as it is")


def _add_setting(group: Any, name: str, **fields: Any) -> None:
    """An option under the name that it has in other commands, and under the one that says whose it is."""
    group.add_argument(f"--{name}", f"--ailurus-{name}", dest=f"ailurus_{name.replace('-', '_')}", **fields)


def run(args: argparse.Namespace) -> int:
    """Makes the video; returns 0, or raises AiluRusError before anything is written."""
    from .. import ailurus_status, apply_ailurus, remove_ailurus
    from .. import video as media
    from ..evaluation.loading import BadInputError, choose_device, with_clustering
    from ..images import check_enlarged
    from ..visualization import side_by_side
    from .telling import progress
    from .video_sampling import fitted_size, load_pipeline, read_frames, sample_frames, trained_side, write_or_keep

    given = {n: v for n in AILURUS_FIELDS if (v := getattr(args, f"ailurus_{n}")) is not None}
    settings = given_clustering(args)
    if args.config and args.preset:
        raise BadInputError("--config and --preset do not go together: both are whole settings")
    if args.no_ailurus and (given or settings or args.preset or args.config or args.compare):
        whole = [name for name in ("compare", "preset", "config") if getattr(args, name)]
        other = f"--{[*whole, *(f'ailurus-{name}'.replace('_', '-') for name in (*given, *settings))][0]}"
        raise BadInputError(f"--no-ailurus and {other} do not go together")
    if args.interpolator and not args.smooth_steps:
        raise BadInputError("--interpolator is for --smooth-steps: without it nothing is interpolated")
    logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)
    # What can be wrong is told before anything slow, in the order of its cost.
    config = with_clustering(_config(args, given), settings)
    output = media.check_output(args.output, source=args.video)
    beside = media.check_output(_beside(output), source=args.video) if args.compare else None
    for path in (output, beside):
        if path is not None and path.is_file() and not args.overwrite:
            raise BadInputError(f"{path} is there already: --overwrite replaces it, --output names another file")
    clip = media.open_clip(
        args.video,
        every=args.every,
        fps=args.fps,
        max_frames=args.frames or DEFAULT_FRAMES,
        min_frames=args.frames or 2,
    )
    device = choose_device(args.device)
    with contextlib.redirect_stdout(io.StringIO()):  # some of controlnet_aux's detectors print while they load
        condition = media.load_condition(
            args.condition,
            device=device,
            low_threshold=args.canny[0],
            high_threshold=args.canny[1],
            **({"annotators": args.annotators} if args.annotators else {}),
        )
    interpolator: Any = None
    if args.interpolator is not None:
        interpolator = media.NetworkInterpolator.from_file(args.interpolator, device)
    elif args.smooth_steps:
        interpolator = media.FlowInterpolator()
    pipe = load_pipeline(args, device)
    if not args.no_ailurus:
        apply_ailurus(pipe, config)  # a model that cannot be reduced is refused before the clip is read

    size = fitted_size(clip.size, args.height, args.width, trained_side(pipe), pipe.vae_scale_factor)
    check_enlarged(clip.size, size, "the shorter side as the model was trained; give --height and --width")
    frames = read_frames(clip, size)
    media.check_output(output, frames=(len(frames), size))
    controls = [condition(frame) for frame in progress(frames)]
    fps = clip.fps or DEFAULT_FPS

    def sample(name: str, steps: int = args.steps) -> tuple[list[Image.Image], float]:
        return sample_frames(pipe, args, name, steps, controls, size, interpolator)

    result: dict[str, Any] = {}
    plain: list[Image.Image] = []
    if args.compare:
        sample("warming up", 1)  # kernels are chosen, memory is taken: of neither's time
        remove_ailurus(pipe)
        sample("warming up", 1)
        plain, result["plain_seconds"] = sample("plain")
        apply_ailurus(pipe, config)
    made, seconds = sample("plain" if args.no_ailurus else "AiluRus")
    write_or_keep(output, made, fps)
    result = {"seconds": seconds, **result, "output": str(output)}
    if beside is not None:
        result["speedup"] = result["plain_seconds"] / seconds
        result["psnr"] = media.psnr(plain, made)
        titles = f"plain: {result['plain_seconds']:.1f} s", f"AiluRus: {seconds:.1f} s ({result['speedup']:.2f}x)"
        write_or_keep(beside, side_by_side([plain, made], titles), fps)
        result["comparison"] = str(beside)

    status = None if args.no_ailurus else ailurus_status(pipe)
    if args.json:
        found = {
            "model": args.model,
            "controlnet": args.controlnet,
            "device": str(device),
            "dtype": args.dtype,
            "frames": len(made),
            "size": list(size),
            "fps": float(fps),
            "steps": args.steps,
            **{k: round(v, 3) if isinstance(v, float) and math.isfinite(v) else v for k, v in result.items()},
            "ailurus": status and status.to_dict(),
        }
        if "psnr" in found and not math.isfinite(found["psnr"]):
            found["psnr"] = None  # JSON knows no infinity: the two are equal
        print(json.dumps(found, indent=2))
        return 0
    print(f"{output}: {len(made)} frames, {size[0]}×{size[1]}, {float(fps):g} fps, made in {seconds:.1f} s")
    if status is not None:
        print(status)
    if beside is not None:
        print(f"plain {result['plain_seconds']:.1f} s, AiluRus {seconds:.1f} s: {result['speedup']:.2f}x", end=", ")
        print(f"PSNR between the two {result['psnr']:.1f} dB, side by side in {beside}")
    return 0


def _config(args: argparse.Namespace, given: dict[str, Any]) -> AiluRusDiffusionConfig:
    """Of the preset, the file or the defaults, some fields replaced by those that were given."""
    from .. import AiluRusDiffusionConfig
    from ..config_base import read_config

    if args.preset:
        return AiluRusDiffusionConfig.preset(args.preset, **given)
    if args.config:
        return dataclasses.replace(read_config(AiluRusDiffusionConfig, args.config), **given)
    return AiluRusDiffusionConfig(**given)


def _beside(output: Path) -> Path:
    return output.with_name(f"{output.stem}_comparison{output.suffix}")
