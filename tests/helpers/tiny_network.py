"""What tests know of a tiny diffusion network, and the texts and latents that it is called with."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

LATENTS, TEXT = (8, 12), 16
# Of Wan's transformer, and of SkyReels-V2's, which is made from it.
WAN = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": TEXT,
    "freq_dim": 8,
    "ffn_dim": 32,
    "rope_max_seq_len": 64,
}


def as_they_are(sample, conditions):
    """The arguments of a network that takes latents and its conditions as they are."""
    return (sample,), conditions


def no_positions(network):
    """At the size it was made for, positions are in a buffer."""
    network.pos_embed.pos_embed.zero_()


@dataclass(frozen=True)
class Network:
    """make: a new network. conditions: the keyword arguments of its forward, for a batch. shape: of one input.

    maps: whether it is a UNet, whose stacks go from a map to a map. call: the arguments of a call, from latents
    Tensor[B, *shape] and conditions. no_positions: has tokens of the same content be the same at any place. small: the
    shape of latents to be doubled so many times, as rows and columns. each: whether it needs what every block gave.
    """

    make: Callable[[], nn.Module]
    conditions: Callable[[int], dict] = lambda batch: {"encoder_hidden_states": text(batch)}
    shape: tuple[int, ...] = (4, *LATENTS)
    maps: bool = True
    grids: list[tuple[int, ...]] = field(default_factory=lambda: [LATENTS, (4, 6)])
    call: Callable[[torch.Tensor, dict], tuple[tuple, dict]] = as_they_are
    no_positions: Callable[[nn.Module], None] = no_positions
    small: tuple[tuple[int, ...], int] = ((4, 4, 4), 4)
    each: bool = False


def text(batch, seed=1):
    return torch.randn(batch, 5, TEXT, generator=torch.Generator().manual_seed(seed))


def text_mask(batch):
    """Which text tokens are no padding: all of the first image's, three of the next one's, and so on."""
    lengths = 5 - 2 * (torch.arange(batch)[:, None] % 2)
    return (torch.arange(5) < lengths).long()


def packed(latents):
    """Latents as Flux takes them: Tensor[B, C, H, W] to [B, HW/4, 4C] and the position of each token."""
    height, width = (side // 2 for side in latents.shape[-2:])
    tokens = latents.unflatten(2, (height, 2)).unflatten(4, (width, 2)).permute(0, 2, 4, 1, 3, 5)
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(float(height)), torch.arange(float(width)))
    return tokens.flatten(3).flatten(1, 2), ids
