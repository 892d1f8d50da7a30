"""Calls that merged tokens cannot follow: each function raises AiluRusError on them, for `DiffusionNetwork.refuses`."""

from __future__ import annotations

from typing import Any

from ..errors import AiluRusError
from .calls import NetworkCall


def refuse_diffusion_forcing(call: NetworkCall) -> None:
    """Where SkyReels-V2's frames have timesteps of their own, or attend to those before them only."""
    network: Any = call.network
    frames = network.config.num_frame_per_block
    if call.argument("enable_diffusion_forcing") or frames > 1:
        what = "enable_diffusion_forcing" if frames == 1 else f"causal attention by {frames} frames"
        raise AiluRusError(f"{what} sets frames apart, and merged tokens may be of several: call the network without")
    if (timesteps := call.timesteps_of_tokens) is not None:
        raise AiluRusError(
            f"timesteps {tuple(timesteps.shape)} are of single frames, and merged tokens may be of several: give one a "
            f"video, ({call.latents.shape[0]},)"
        )


def refuse_replaced_tokens(call: NetworkCall) -> None:
    """Where HunyuanVideo's tokens of the first frame have a timestep of their own."""
    network: Any = call.network
    if network.config.image_condition_type == "token_replace":
        raise AiluRusError(
            "image_condition_type='token_replace' gives the first frame's tokens another timestep, which cannot follow "
            "merged tokens"
        )


def refuse_sparse_attention(call: NetworkCall) -> None:
    """Where Kandinsky's attention is sparse, in windows of the grid."""
    if call.argument("sparse_params") is not None:
        raise AiluRusError(
            "sparse_params choose keys by windows of all tokens' grid, which merged tokens have left: call the network "
            "without them"
        )


def refuse_kept_references(call: NetworkCall) -> None:
    """Where Flux.2 keeps keys and values of reference images from step to step."""
    if (mode := call.argument("kv_cache_mode")) is not None:
        raise AiluRusError(
            f"kv_cache_mode={mode!r} keeps keys and values of reference images' tokens, which cannot follow merged "
            "tokens: call the network without it"
        )


def refuse_several_images(call: NetworkCall) -> None:
    """Where Z-Image is called with reference images."""
    if call.argument("siglip_feats") is not None or call.argument("image_noise_mask") is not None:
        raise AiluRusError(
            "siglip_feats and image_noise_mask are of several images in one sequence, whose tokens cannot be merged"
        )
