"""ControlVideo at full Stable Diffusion 1.5 size: plain, tomesd, VidToMe-style merging and AiluRus, over SDPA.

    python -m benchmarks.video.controlvideo_speed --flops --dtype bf16  # FLOPs, memory by shapes: 15 frames, 512²
    python -m benchmarks.video.controlvideo_speed --frames 8 --size 256             # one denoising step, fp32, CPU
    python -m benchmarks.video.controlvideo_speed --whole --device cuda --dtype bf16 --frames 15 --size 512

A step is UNet and ControlNet on all frames under guidance, as the pipeline calls them. --whole times a video of 50
steps with its decoding. Random weights: speed does not depend on them. Fidelity here is the cosine to the plain
prediction on noise, a lower bound; quality is measured on trained models. Every contender is undone before the next
one's turn.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from ailurus_hf import apply_ailurus, remove_ailurus
from ailurus_hf.diffusion.frames import Frames
from ailurus_hf.diffusion.stacks import find_stacks, self_attentions
from ailurus_hf.pipelines import ControlVideoPipeline

from ..harness import environment, log, markdown, methods_in_turn, model_flops, peak_on_shapes, save, switched
from ..peers.tomesd import merged_by_tomesd
from ..peers.vidtome import VidToMeProcessor

UNET: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
CONTROLNET: dict[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "sample_size": 512,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of latents to pixels.
FACTOR = 8

Switch = Callable[[ControlVideoPipeline, int, int], Callable[[], Any]]


def ours(**fields: Any) -> Switch:
    def on(pipe: ControlVideoPipeline, frames: int, latent_tokens: int) -> Callable[[], Any]:
        apply_ailurus(pipe, **fields)
        return lambda: remove_ailurus(pipe)

    return on


def by_resolution(**fields: Any) -> Switch:
    """Ours where the first stack of a resolution clusters for the later ones."""
    return ours(cluster_per="resolution", **fields)


def with_tomesd(**settings: Any) -> Switch:
    """Per frame, in UNet and ControlNet; the frames' merged tokens are joined."""
    return lambda pipe, frames, latent_tokens: merged_by_tomesd([pipe.unet, pipe.controlnet], **settings)


def vidtome(pipe: ControlVideoPipeline, frames: int, latent_tokens: int) -> Callable[[], Any]:
    """Instead of the UNet's cross-frame attention; the ControlNet stays as it is."""
    processor = VidToMeProcessor(frames, latent_tokens)
    plain = pipe._over_frames

    class OnIt(AbstractContextManager):
        """The contexts around this one put processors back."""

        def __enter__(self) -> None:
            for layer in self_attentions(find_stacks(pipe.unet)).values():
                layer.set_processor(processor)

        def __exit__(self, *exception: object) -> None:
            pass

    pipe._over_frames = lambda *arguments: [*plain(*arguments), OnIt()]
    return lambda: vars(pipe).pop("_over_frames")


# Each switches itself on and returns what switches it off.
METHODS: dict[str, Switch] = {
    "plain": lambda pipe, frames, latent_tokens: lambda: None,
    "tomesd 0.5": with_tomesd(ratio=0.5),
    "tomesd 0.75, all": with_tomesd(ratio=0.75, max_downsample=2, merge_crossattn=True, merge_mlp=True),
    "VidToMe": vidtome,
}
for ratio in (0.5, 0.25, 0.125):
    for way in ("each", "joint"):
        METHODS[f"{way} {ratio}"] = by_resolution(keep_ratio=ratio, frames=way)
METHODS["each 0.25, merged projections"] = by_resolution(keep_ratio=0.25, frames="each", projections="merged")
METHODS["joint 0.25, merged projections"] = by_resolution(keep_ratio=0.25, frames="joint", projections="merged")
METHODS["each 0.25, attention"] = by_resolution(keep_ratio=0.25, frames="each", scope="attention")

COLUMNS = {
    "frames": "frames",
    "size": "image|{}²",
    "method": "method",
    "tflops": "FLOPs|{:.1f} T",
    "share_of_flops": "of plain|{:.1%}",
    "seconds": "time|{:.2f} s",
    "speed_up": "speed-up|{:.2f}×",
    "ideal": "FLOPs-ideal|{:.2f}×",
    "share_of_ideal": "share|{:.3f}",
    "peak_mib": "peak memory|{:.0f} MiB",
    "cosine": "cosine|{:.3f}",
}


def make_pipeline(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    unet: dict[str, Any] = UNET,
    controlnet: dict[str, Any] = CONTROLNET,
    vae: dict[str, Any] | None = None,
) -> ControlVideoPipeline:
    """Networks with random weights, made where and in what they run."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            parts = {"unet": UNet2DConditionModel(**unet), "controlnet": ControlNetModel(**controlnet)}
            parts["vae"] = AutoencoderKL(**vae) if vae is not None else None
    finally:
        torch.set_default_dtype(before)
    for part in parts.values():
        _ = part is not None and part.eval()
    if device.type != "meta":
        # Zero convolutions would leave the ControlNet without effect.
        for parameter in parts["controlnet"].parameters():
            _ = parameter.abs().max() == 0 and torch.nn.init.normal_(parameter.data, std=0.02)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDIMScheduler(**betas, clip_sample=False, steps_offset=1)
    pipe = ControlVideoPipeline(**parts, text_encoder=None, tokenizer=None, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(pipe: ControlVideoPipeline, frames: int, size: int, number: int) -> dict[str, Any]:
    """What a video starts from; the number gives other noise and another clip, in which a square moves."""
    device, dtype = pipe.unet.device, pipe.unet.dtype
    generator = torch.Generator().manual_seed(number)
    clip = torch.rand(1, 3, size, size, generator=generator).repeat(frames, 1, 1, 1)
    for frame in range(frames):
        clip[frame, :, size // 4 : size // 2, frame : frame + size // 4] = 1
    prompts = torch.randn(2, 77, pipe.unet.config.cross_attention_dim, generator=generator)
    noise = torch.randn(1, 4, size // FACTOR, size // FACTOR, generator=generator)
    made = {"latents": noise.repeat(frames, 1, 1, 1), "prompt_embeds": prompts, "clip": clip}
    return {name: value.to(device, dtype) for name, value in made.items()}


def step_of(pipe: ControlVideoPipeline, given: dict[str, Any]) -> Tensor:
    """The networks' prediction of one denoising step, as the pipeline makes it: Tensor[F, 4, h, w]."""
    pipe._guidance_scale = 12.5
    if pipe.scheduler.num_inference_steps is None:
        pipe.scheduler.set_timesteps(50)
    frames = Frames.attending("full", range(len(given["latents"])))
    with ExitStack() as stack:
        for context in pipe._over_frames(frames, True, None):
            stack.enter_context(context)
        return pipe._predict(
            given["latents"], pipe.scheduler.timesteps[20], given["prompt_embeds"], [given["clip"]], [1.0], frames
        )


def video_of(pipe: ControlVideoPipeline, given: dict[str, Any], steps: int = 50) -> Tensor:
    without, prompt = given["prompt_embeds"].chunk(2)
    return pipe(
        None, given["clip"].float(), latents=given["latents"][:1], num_inference_steps=steps, output_type="pt",
        prompt_embeds=prompt, negative_prompt_embeds=without,
    ).frames  # fmt: skip


def counted_flops(
    frames: int,
    size: int,
    methods: list[str],
    unet: dict[str, Any] = UNET,
    controlnet: dict[str, Any] = CONTROLNET,
    dtype: torch.dtype = torch.float32,
) -> list[dict[str, Any]]:
    """FLOPs of a step by torch's counter, with all that a method does, and its estimated memory beside the weights.

    On shapes alone: nothing is computed.
    """
    pipe, rows = make_pipeline(torch.device("meta"), dtype, unet, controlnet), []
    given = inputs(pipe, frames, size, 0)
    for name in methods:
        try:
            with switched(lambda name=name: METHODS[name](pipe, frames, (size // FACTOR) ** 2)):
                step_of(pipe, given)  # tables of the grid are made once, and are no part of a step
                flops, peak = (count(lambda: step_of(pipe, given)) for count in (model_flops, peak_on_shapes))
        except NotImplementedError:
            continue  # tomesd asks for numbers, which shapes alone do not have
        rows.append({"frames": frames, "size": size, "method": name, "tflops": flops / 1e12, "peak_mib": peak / 2**20})
    for row in rows:
        row["share_of_flops"] = row["tflops"] / rows[0]["tflops"]
    return rows


@torch.inference_mode()
def measure(
    pipe: ControlVideoPipeline,
    frames: int,
    size: int,
    methods: list[str],
    repeats: int,
    *,
    whole: bool = False,
    steps: int = 50,
) -> list[dict[str, Any]]:
    """One row a method. Methods share the networks: each is on during its own turn only. steps: of a whole video."""
    device = pipe.unet.device
    given = [inputs(pipe, frames, size, number) for number in range(2)]
    methods = ["plain", *(name for name in methods if name != "plain")]
    networks = dict(pipe.unet.config), dict(pipe.controlnet.config)
    full = 1e12 * counted_flops(frames, size, ["plain"], *networks)[0]["tflops"]
    run = partial(video_of, steps=steps) if whole else step_of
    rows = methods_in_turn(
        pipe,
        {name: partial(METHODS[name], pipe, frames, (size // FACTOR) ** 2) for name in methods},
        lambda number: step_of(pipe, given[number % len(given)]),
        full,
        repeats,
        device,
        images=2 * frames,
        timed=lambda number: run(pipe, given[number % len(given)]),
    )
    return [{"frames": frames, "size": size, "whole": whole, **row} for row in rows.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", nargs="+", type=int, help="default: 15 with --flops, else 8")
    parser.add_argument(
        "--size", nargs="+", type=int, help="image sides in pixels; default: 512 with --flops, else 256"
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--flops", action="store_true", help="count FLOPs only")
    parser.add_argument("--whole", action="store_true", help="whole videos of 50 steps instead of single steps")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own")
    parser.add_argument("--name", help="of the result file; default: controlvideo_step_sd15, or _flops_, or _video_")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.threads:
        torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    pipe = None if args.flops else make_pipeline(args.device, DTYPES[args.dtype], vae=VAE if args.whole else None)
    for size in args.size or [512 if args.flops else 256]:
        for frames in args.frames or [15 if args.flops else 8]:
            if pipe is None:
                new = counted_flops(frames, size, args.methods, dtype=DTYPES[args.dtype])
            else:
                new = measure(pipe, frames, size, args.methods, args.repeats, whole=args.whole)
            log.info(markdown(new, COLUMNS))
            rows += new
    kind = "flops" if args.flops else "video" if args.whole else "step"
    save(args.name or f"controlvideo_{kind}_sd15", rows, environment(args.device, args.dtype))
    print(markdown(rows, COLUMNS))


if __name__ == "__main__":
    main()
