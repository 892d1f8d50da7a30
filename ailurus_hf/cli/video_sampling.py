"""What `ailurus-hf video` runs: the pipeline loaded, the clip's frames at the video's size, and frames sampled."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from ..errors import AiluRusError
from ..evaluation.loading import BadInputError, check_name, first_line, read_pretrained
from ..extras import require
from ..video import write_video


def load_pipeline(args: argparse.Namespace, device: Any) -> Any:
    """The pipeline of --model and --controlnet. Raises BadInputError where its parts do not go together."""
    # Errors are told in one line: transformers warns already while diffusers is imported.
    transformers = require("transformers", "video")
    transformers.utils.logging.set_verbosity_error()
    diffusers = require("diffusers", "video")
    diffusers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        for library in (diffusers, transformers):
            library.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    from ..pipelines import ControlVideoPipeline

    check_name(args.model, "model_index.json")
    check_name(args.controlnet, "config.json")
    controlnet = read_pretrained(args.controlnet, diffusers.ControlNetModel.from_pretrained)
    pipe = read_pretrained(args.model, ControlVideoPipeline.from_pretrained, controlnet=controlnet)
    _check_parts(pipe, args)
    if args.smooth_steps:  # the smoother is derived for it
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    # The precision's name in from_pretrained differs between versions of diffusers.
    return pipe.to(device, getattr(torch, args.dtype))


def _check_parts(pipe: Any, args: argparse.Namespace) -> None:
    unet, controlnet, steps = pipe.unet.config, pipe.controlnet.config, pipe.scheduler.config.num_train_timesteps
    if getattr(unet, "addition_embed_type", None) is not None:
        raise BadInputError(
            f"{args.model} is a model like SDXL (its UNet wants {unet.addition_embed_type!r}): ControlVideo needs "
            "Stable Diffusion 1.x or 2.x"
        )
    if unet.in_channels != pipe.vae.config.latent_channels:
        raise BadInputError(
            f"the UNet of {args.model} takes {unet.in_channels} channels, its latents have "
            f"{pipe.vae.config.latent_channels}: ControlVideo needs a text-to-image model"
        )
    if controlnet.cross_attention_dim != unet.cross_attention_dim:
        raise BadInputError(
            f"{args.controlnet} is for another model than {args.model}: it attends to text of "
            f"{controlnet.cross_attention_dim} channels, the UNet to {unet.cross_attention_dim}"
        )
    if args.steps > steps:
        raise BadInputError(f"--steps must be at most {steps}, as many as the model was trained with, got {args.steps}")


def trained_side(pipe: Any) -> int:
    """Pixels of a side that the UNet was trained for."""
    latents = getattr(pipe.unet.config, "sample_size", None) or 64
    return (latents if isinstance(latents, int) else min(latents)) * pipe.vae_scale_factor


def fitted_size(
    source: tuple[int, int], height: int | None, width: int | None, shorter: int, multiple: int
) -> tuple[int, int]:
    """(width, height) of the video, in multiples of the VAE's factor; what is not given keeps the source's shape."""

    def nearest(side: float) -> int:
        return max(round(side / multiple), 1) * multiple

    if height is None and width is None:
        scale = shorter / min(source)
        return nearest(source[0] * scale), nearest(source[1] * scale)
    if width is None:
        width = nearest(source[0] * (height or 0) / source[1])
    return width, height or nearest(source[1] * width / source[0])


def read_frames(clip: Any, size: tuple[int, int]) -> list[Image.Image]:
    """The clip's frames at that size: scaled to cover it, what reaches over is cut off on both sides."""
    return [ImageOps.fit(frame, size, Image.Resampling.LANCZOS) for frame in clip]


def sample_frames(
    pipe: Any,
    args: argparse.Namespace,
    name: str,
    steps: int,
    controls: list[Image.Image],
    size: tuple[int, int],
    interpolator: Any,
) -> tuple[list[Image.Image], float]:
    """The frames, and the seconds they took: they are on the host, so whatever a device had queued is done."""
    pipe.set_progress_bar_config(desc=name, disable=None, leave=False)  # None: no bar where nobody watches
    start = time.perf_counter()
    try:
        frames = pipe(
            args.prompt,
            controls,
            negative_prompt=args.negative_prompt,
            width=size[0],
            height=size[1],
            num_inference_steps=steps,
            guidance_scale=args.guidance_scale,
            controlnet_conditioning_scale=args.controlnet_scale,
            generator=torch.Generator().manual_seed(args.seed),
            cross_frame=args.cross_frame,
            smooth_steps=tuple(args.smooth_steps) if steps == args.steps else (),
            interpolator=interpolator,
            clip_length=args.clip_length,
            attention_chunk=args.attention_chunk,
        ).frames
    except torch.OutOfMemoryError as error:
        chunk = "" if args.attention_chunk else " --attention-chunk 1,"
        raise AiluRusError(
            f"{len(controls)} frames of {size[0]}×{size[1]} do not fit in memory: try{chunk} --clip-length 7, "
            "fewer --frames or a smaller --height"
        ) from error
    except AiluRusError:
        raise
    except (ValueError, RuntimeError) as error:  # of diffusers and torch: parts that do not go together
        raise BadInputError(f"{args.model} cannot run with {args.controlnet}: {first_line(error)}") from error
    return frames, time.perf_counter() - start


def write_or_keep(path: Path, frames: Sequence[Image.Image], fps: float | Fraction) -> None:
    """Writes the frames; where that fails, keeps them as PNGs in the folder for temporary files.

    Raises:
        AiluRusError: they could not be written to `path`; says where they are.
    """
    try:
        write_video(path, frames, fps)
    except AiluRusError as error:
        try:
            folder = Path(tempfile.mkdtemp(prefix="ailurus-frames-"))
            write_video(folder, frames, fps)
        except (AiluRusError, OSError):
            raise error from None
        raise AiluRusError(f"{error}; the frames are in {folder}") from error
