"""ControlVideoPipeline: text to video by an image model and a ControlNet (Zhang et al. 2023, arXiv 2305.13077).

    pipe = ControlVideoPipeline.from_pretrained(stable_diffusion, controlnet=controlnet)
    frames = pipe("a man wanders on the ocean", edges).frames

The frames are the batch. Self-attention of the UNet takes the keys of other frames, group norms take statistics over
all frames, and all frames start from the same noise. No weights or model code are added; `apply_ailurus(pipe)` works.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import FromSingleFileMixin, StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from diffusers.models.controlnets import ControlNetModel, MultiControlNetModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, StableDiffusionMixin
from diffusers.pipelines.stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers import DDIMScheduler, KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ailurus_hf.diffusion.frames import Frames
from ailurus_hf.diffusion.networks import find_networks
from ailurus_hf.errors import AiluRusError
from ailurus_hf.pipelines.controlvideo.control_frames import as_frames
from ailurus_hf.pipelines.controlvideo.cross_frame import CrossFrameAttention
from ailurus_hf.pipelines.controlvideo.key_frames import parts_of
from ailurus_hf.pipelines.controlvideo.shared_norm import SharedGroupNorm
from ailurus_hf.pipelines.controlvideo.smoothing import smoothed
from ailurus_hf.video.interpolation import FlowInterpolator, Interpolator

CROSS_FRAME = ("full", "sparse_causal", "first")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class ControlVideoPipelineOutput(BaseOutput):
    """What `ControlVideoPipeline` returns.

    Args:
        frames: of one video: a list of PIL images, an array [F, H, W, 3], a Tensor[F, 3, H, W], or latents.

    Example:
        write_video("ocean.mp4", pipe("a man wanders on the ocean", edges).frames, 8)
    """

    frames: Any


class ControlVideoPipeline(
    DiffusionPipeline,
    StableDiffusionMixin,
    TextualInversionLoaderMixin,
    StableDiffusionLoraLoaderMixin,
    FromSingleFileMixin,
):
    """Text to video by Stable Diffusion 1.x or 2.x and one or several ControlNets (ControlVideo, arXiv:2305.13077).

    Args:
        vae, text_encoder, tokenizer, unet, scheduler: of a Stable Diffusion.
        controlnet: a ControlNetModel, or a list of them (then a list of control frames is given, one for each).

    Example:
        pipe = ControlVideoPipeline.from_pretrained(stable_diffusion, controlnet=controlnet)
        frames = pipe("a man wanders on the ocean", edges).frames
    """

    vae: Any
    unet: Any
    controlnet: Any
    scheduler: Any
    model_cpu_offload_seq: Any = "text_encoder->unet->vae"
    _callback_tensor_inputs = ["latents", "prompt_embeds"]

    encode_prompt = StableDiffusionPipeline.encode_prompt

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        controlnet: ControlNetModel | list[ControlNetModel] | tuple[ControlNetModel] | MultiControlNetModel,
        scheduler: KarrasDiffusionSchedulers,
    ) -> None:
        super().__init__()
        if isinstance(controlnet, (list, tuple)):
            controlnet = MultiControlNetModel(controlnet)
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            controlnet=controlnet,
            scheduler=scheduler,
        )
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1) if vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self.control_image_processor = VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor, do_convert_rgb=True, do_normalize=False
        )
        self._guidance_scale = 1.0
        self._interrupt = False

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to leave out the remaining steps."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | None,
        control_frames: Any,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 12.5,
        controlnet_conditioning_scale: float | list[float] = 1.0,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_frame: str = "full",
        shared_group_norm: bool = True,
        smooth_steps: Sequence[int] = (),
        interpolator: Interpolator | None = None,
        clip_length: int | None = None,
        attention_chunk: int | None = None,
        callback_on_step_end: Callable[[Any, int, Any, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
    ) -> Any:
        """Makes one video with as many frames as there are control frames.

        control_frames: PIL images (a list, a `Clip`, any iterable, or one), or Tensor[F, 3, H, W] in [0, 1]; for
            several ControlNets a list of those.
        height, width: in pixels, multiples of the VAE's factor (8); default: those of the control frames, rounded down.
        latents: start noise, Tensor[1 or F, C, h, w]; default: from `generator`, the same for all frames.
        output_type: "pil", "np", "pt" or "latent".
        cross_frame: whose keys and values a frame takes: "full" (all frames', as ControlVideo), "sparse_causal" (those
            of the first and the previous) or "first".
        shared_group_norm: statistics of the norms around convolutions over all frames, in UNet and ControlNet.
        smooth_steps: numbers of the denoising steps, 0 the first, after which every second frame is made of its
            neighbors; ControlVideo takes 30 and 31 of 50. Needs DDIMScheduler.
        interpolator: makes the frames half way, from Tensor[B, 3, H, W] in [0, 1] twice to the same; default: OpenCV's
            optical flow (FlowInterpolator). `NetworkInterpolator.from_file("flownet.pkl")` is RIFE, as ControlVideo's.
        clip_length: for long videos: key frames are denoised together, one every clip_length - 1 frames and the last,
            and the frames between two of them apart from all others, with the keys and values of those two. A clip has
            both in it, so at least 3. None: all frames at once.
        attention_chunk: frames that ask at once in self-attention, where memory is short; None: all.
        callback_on_step_end: called as (pipeline, step, timestep, tensors); the tensors it returns replace those here.
        prompt_embeds, negative_prompt_embeds: Tensor[1, L, D] instead of prompts.
        Returns ControlVideoPipelineOutput, or (frames,). Raises AiluRusError on what does not fit together.
        """
        self._guidance_scale, self._interrupt = guidance_scale, False
        device = self._execution_device
        conditions = self._conditions(control_frames, height, width, device)
        count, (height, width) = len(conditions[0]), conditions[0].shape[-2:]
        scales = self._scales(controlnet_conditioning_scale, len(conditions))
        self._check(
            prompt, prompt_embeds, output_type, cross_frame, clip_length, attention_chunk,
            smooth_steps, num_inference_steps, callback_on_step_end_tensor_inputs,
        )  # fmt: skip

        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt,
            device,
            1,
            self.do_classifier_free_guidance,
            negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
        )
        if self.do_classifier_free_guidance:
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
        prompt_embeds = prompt_embeds.to(self.unet.dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        latents = self._start(latents, count, height, width, prompt_embeds.dtype, device, generator)
        parts = [
            (part, self._over_frames(part.frames, shared_group_norm, attention_chunk))
            for part in parts_of(count, cross_frame, clip_length)
        ]
        if smooth_steps and interpolator is None:
            interpolator = FlowInterpolator()
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        randomness = {"generator": generator} if takes_generator else {}

        with self.progress_bar(total=len(timesteps)) as progress:
            for step, timestep in enumerate(timesteps):
                if self.interrupt:
                    continue
                noise = torch.empty_like(latents)
                for part, over_frames in parts:
                    with ExitStack() as stack:
                        for context in over_frames:
                            stack.enter_context(context)
                        predicted = self._predict(latents, timestep, prompt_embeds, conditions, scales, part.frames)
                    noise[[part.frames.numbers[index] for index in part.kept]] = predicted[part.kept]
                stepped = self.scheduler.step(noise, timestep, latents, **randomness)
                latents = stepped.prev_sample
                if interpolator is not None and step in smooth_steps:
                    latents = self._smooth(latents, stepped.pred_original_sample, timestep, step, interpolator)
                if callback_on_step_end is not None:
                    known = {"latents": latents, "prompt_embeds": prompt_embeds}
                    tensors = {name: known[name] for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, step, timestep, tensors) or {}
                    latents = changed.pop("latents", latents)
                    prompt_embeds = changed.pop("prompt_embeds", prompt_embeds)
                progress.update()

        if output_type == "latent":
            frames = latents
        else:
            if getattr(self, "final_offload_hook", None) is not None:
                # Of the networks, which the sequence offloads one after the other, two were in use at once.
                self.unet.to("cpu")
                self.controlnet.to("cpu")
            frames = self.image_processor.postprocess(
                self._decode(latents), output_type, do_denormalize=[False] * count
            )
        self.maybe_free_model_hooks()
        return ControlVideoPipelineOutput(frames=frames) if return_dict else (frames,)

    def _over_frames(
        self, frames: Frames, shared_norm: bool, attention_chunk: int | None
    ) -> list[AbstractContextManager]:
        """The UNet attends over frames, the ControlNets frame by frame; all of them know which frames they get."""
        alone = Frames.attending("own", frames.numbers)
        contexts: list[AbstractContextManager] = []
        for part, attending in ((self.unet, frames), (self.controlnet, alone)):
            for network in find_networks(part):
                contexts.append(CrossFrameAttention(network, attending, frames_at_once=attention_chunk))
                if shared_norm:
                    contexts.append(SharedGroupNorm(network, frames))
        return contexts

    def _predict(
        self,
        latents: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        conditions: list[Tensor],
        scales: list[float],
        frames: Frames,
    ) -> Tensor:
        """The network's prediction for some of the frames, with guidance: Tensor[F, C, h, w]."""
        halves, rows = len(prompt_embeds), list(frames.numbers)
        sample = self.scheduler.scale_model_input(latents[rows].repeat(halves, 1, 1, 1), timestep)
        prompts = prompt_embeds.repeat_interleave(len(rows), 0)
        shown = [condition[rows].repeat(halves, 1, 1, 1) for condition in conditions]
        several = len(shown) > 1 or isinstance(self.controlnet, MultiControlNetModel)
        down, middle = self.controlnet(
            sample,
            timestep,
            encoder_hidden_states=prompts,
            controlnet_cond=shown if several else shown[0],
            conditioning_scale=scales if several else scales[0],
            return_dict=False,
        )
        predicted: Tensor = self.unet(
            sample,
            timestep,
            encoder_hidden_states=prompts,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]
        if halves == 1:
            return predicted
        without, with_prompt = predicted.chunk(2)
        return without + self.guidance_scale * (with_prompt - without)

    def _smooth(
        self, latents: Tensor, clean: Tensor, timestep: Tensor, step: int, interpolator: Interpolator
    ) -> Tensor:
        """The step's result had it predicted smoothed frames, with the same noise (DDIM, η = 0)."""
        previous = int(timestep) - self.scheduler.config.num_train_timesteps // self.scheduler.num_inference_steps
        alpha = self.scheduler.alphas_cumprod[previous] if previous >= 0 else self.scheduler.final_alpha_cumprod
        smooth = smoothed(clean, step, interpolator, self._decode, self._encode)
        return latents + alpha.sqrt().to(latents) * (smooth - clean)

    def _decode(self, latents: Tensor) -> Tensor:
        """Pictures in [0, 1], one frame after the other: a VAE needs much memory."""
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        frames = [self.vae.decode(frame, return_dict=False)[0].float() for frame in latents.split(1)]
        return (torch.cat(frames) / 2 + 0.5).clamp(0, 1)

    def _encode(self, pictures: Tensor) -> Tensor:
        pictures = (2 * pictures - 1).to(self.vae.dtype)
        latents = [self.vae.encode(frame).latent_dist.mode() for frame in pictures.split(1)]
        return torch.cat(latents) * self.vae.config.scaling_factor

    def _start(
        self,
        latents: Tensor | None,
        count: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | None,
    ) -> Tensor:
        shape = self.unet.config.in_channels, height // self.vae_scale_factor, width // self.vae_scale_factor
        if latents is None:
            latents = randn_tensor((1, *shape), generator=generator, device=device, dtype=dtype)
        if tuple(latents.shape) not in ((1, *shape), (count, *shape)):
            raise AiluRusError(f"latents must be {(1, *shape)} or {(count, *shape)}, got {tuple(latents.shape)}")
        started: Tensor = latents.to(device, dtype).expand(count, *shape) * self.scheduler.init_noise_sigma
        return started

    def _conditions(
        self, control_frames: Any, height: int | None, width: int | None, device: torch.device
    ) -> list[Tensor]:
        """One Tensor[F, 3, H, W] in [0, 1] for each ControlNet."""
        networks = len(self.controlnet.nets) if isinstance(self.controlnet, MultiControlNetModel) else 1
        given = control_frames if networks > 1 else [control_frames]
        several = isinstance(self.controlnet, MultiControlNetModel)
        if networks == 1 and several and isinstance(control_frames, (list, tuple)) and len(control_frames) == 1:
            given = control_frames
        if not isinstance(given, (list, tuple)):
            raise AiluRusError(
                f"{networks} ControlNets need a list with the control frames of each, got {type(given).__name__}"
            )
        if len(given) != networks:
            raise AiluRusError(f"{networks} ControlNets need as many lists of control frames, got {len(given)}")
        conditions = [self._condition(frames, height, width).to(device, self.unet.dtype) for frames in given]
        shapes = [tuple(condition.shape) for condition in conditions]
        if len(set(shapes)) > 1:
            raise AiluRusError(f"control frames must be as many and as large for each ControlNet, got {shapes}")
        return conditions

    def _condition(self, frames: Any, height: int | None, width: int | None) -> Tensor:
        frames = as_frames(frames)
        like = frames if isinstance(frames, Tensor) else frames[0]
        default = self.control_image_processor.get_default_height_width(like)
        height, width = height or default[0], width or default[1]
        for name, side in (("height", height), ("width", width)):
            if side < 1 or side % self.vae_scale_factor:
                nearest = max(side // self.vae_scale_factor, 1) * self.vae_scale_factor
                raise AiluRusError(f"{name} must be a multiple of {self.vae_scale_factor}, got {side}: use {nearest}")
        condition: Tensor = self.control_image_processor.preprocess(frames, height, width)
        return condition

    def _scales(self, given: float | list[float], networks: int) -> list[float]:
        scales = list(given) if isinstance(given, (list, tuple)) else [given] * networks
        if len(scales) != networks:
            raise AiluRusError(f"controlnet_conditioning_scale needs {networks} numbers, got {len(scales)}")
        return scales

    def _check(
        self,
        prompt: str | None,
        prompt_embeds: Tensor | None,
        output_type: str,
        cross_frame: str,
        clip_length: int | None,
        attention_chunk: int | None,
        smooth_steps: Sequence[int],
        num_inference_steps: int,
        tensor_inputs: Sequence[str],
    ) -> None:
        if (prompt is None) == (prompt_embeds is None):
            raise AiluRusError("give exactly one of prompt and prompt_embeds")
        if prompt is not None and not isinstance(prompt, str):
            raise AiluRusError(f"prompt must be one string, got {type(prompt).__name__}")
        choices = {"output_type": (output_type, OUTPUT_TYPES), "cross_frame": (cross_frame, CROSS_FRAME)}
        for name, (value, known) in choices.items():
            if value not in known:
                raise AiluRusError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
        if clip_length is not None and clip_length < 3:
            raise AiluRusError(f"clip_length must be at least 3, two key frames and one between, got {clip_length}")
        if attention_chunk is not None and attention_chunk < 1:
            raise AiluRusError(f"attention_chunk must be at least 1, got {attention_chunk}")
        wrong = [step for step in smooth_steps if not 0 <= step < num_inference_steps]
        if wrong:
            raise AiluRusError(f"smooth_steps must be from 0 to {num_inference_steps - 1}, got {wrong}")
        if smooth_steps and not isinstance(self.scheduler, DDIMScheduler):
            raise AiluRusError(f"smooth_steps need a DDIMScheduler, got {type(self.scheduler).__name__}")
        unknown = sorted(set(tensor_inputs) - set(self._callback_tensor_inputs))
        if unknown:
            raise AiluRusError(f"callbacks can have {self._callback_tensor_inputs}, not {unknown}")
