"""One call of a network, its arguments by name; and which pipeline makes it."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..errors import AiluRusError

# Code between a pipeline and the network that it calls.
PLUMBING = ("torch", "accelerate", "peft", "diffusers.hooks", "diffusers.models", "ailurus_hf.diffusion")
COMPREHENSIONS = ("<listcomp>", "<dictcomp>", "<genexpr>")


@dataclass(eq=False)
class NetworkCall:
    """The arguments of one call of a network's forward, given in whatever way.

    Args:
        network: the network, and `names` those of its arguments.
        args, kwargs: what it is called with.
        embedding: the rotary embedding that its blocks get, once it is known.
    """

    network: nn.Module
    names: list[str]
    args: tuple
    kwargs: dict[str, Any]
    embedding: Any = None

    def argument(self, name: str) -> Any:
        """An argument by name, None where it was not given or does not exist."""
        if name in self.kwargs or name not in self.names:
            return self.kwargs.get(name)
        position = self.names.index(name)
        return self.args[position] if position < len(self.args) else None

    @property
    def latents(self) -> Tensor:
        """What the network is called with, Tensor[B, C, H, W], [B, C, F, H, W] or packed [B, N, C]."""
        value: Tensor | list[Tensor] = self.argument(self.names[0])
        if isinstance(value, Tensor):
            return value
        shapes = [tuple(each.shape) if isinstance(each, Tensor) else None for each in value]
        if None in shapes or len(set(shapes)) > 1:
            several = "" if None not in shapes else ": reference images beside one (Z-Image Omni) cannot be reduced"
            raise AiluRusError(f"images must be of one size, and one tensor each, got {shapes}{several}")
        return torch.stack(value)

    @property
    def timestep(self) -> Any:
        """The timestep, None where it is not given."""
        return self.argument("timestep") if "timestep" in self.names else self.argument("t")

    @property
    def timesteps_of_tokens(self) -> Tensor | None:
        """The timesteps, Tensor[B, N], where there is one for each token or frame; None where each image has one."""
        timestep = self.timestep
        return timestep if isinstance(timestep, Tensor) and timestep.ndim > 1 and timestep.shape[1] > 1 else None


def argument_names(network: nn.Module) -> list[str]:
    """The names of a forward's arguments, in order."""
    # Of the class: offloading puts a forward of its own on the instance.
    return list(inspect.signature(type(network).forward).parameters)[1:]


def with_argument(args: tuple, kwargs: dict, position: int, name: str, value: Any) -> tuple[tuple, dict]:
    """The arguments with one of them replaced, wherever it stood."""
    if position < len(args):
        return (*args[:position], value, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: value}


def calling_pipeline() -> DiffusionPipeline | None:
    """The pipeline whose code called the network that is running in this thread, None where other code did.

    Read from the call stack: what a pipeline keeps about its guidance and its scheduler outlives its generation, and
    other pipelines and loops may use the same network and the same scheduler.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if not _is_plumbing(frame):
            owner = _first_argument(frame)
            if isinstance(owner, DiffusionPipeline):
                return owner
            if not isinstance(owner, nn.Module):
                return None
        frame = frame.f_back
    return None


def is_running(network: nn.Module) -> bool:
    """Whether this thread is in a call of the network."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__ and _first_argument(frame) is network:
            return True
        frame = frame.f_back
    return False


def running_network() -> nn.Module | None:
    """The outermost module with a config that this thread is in a call of, for what errors say."""
    found, frame = None, sys._getframe(1).f_back
    while frame is not None:
        owner = _first_argument(frame)
        if isinstance(owner, nn.Module) and hasattr(owner, "register_to_config"):
            found = owner
        frame = frame.f_back
    return found


def calling_block(layer: nn.Module) -> nn.Module | None:
    """The module whose forward called a layer that this thread is in a call of; None where other code did."""
    frame: FrameType | None = sys._getframe(1)
    inside = False
    while frame is not None:
        owner = _first_argument(frame)
        inside = inside or owner is layer
        if inside and owner is not layer and isinstance(owner, nn.Module):
            return owner
        frame = frame.f_back
    return None


def _is_plumbing(frame: FrameType) -> bool:
    module = str(frame.f_globals.get("__name__", ""))
    return frame.f_code.co_name in COMPREHENSIONS or any(
        module == name or module.startswith(f"{name}.") for name in PLUMBING
    )


def _first_argument(frame: FrameType) -> Any:
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None


def guides_by_halves(pipeline: Any, call: NetworkCall) -> bool:
    """Whether a pipeline says that its batches are two halves, without and with the prompt, of the same latents."""
    if not getattr(pipeline, "do_classifier_free_guidance", False) or call.argument("guess_mode"):
        return False
    # These have a third part.
    perturbed = getattr(pipeline, "do_perturbed_attention_guidance", False)
    # Stable Diffusion 3 guides by a call of its own that skips layers, of one half.
    skips = call.argument("skip_layers") is not None
    return not perturbed and not skips and not hasattr(pipeline, "image_guidance_scale")
