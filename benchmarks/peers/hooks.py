"""What the peers share: hooks on one encoder that shorten its token sequence and unmerge it to N tokens at the end.

A peer says where tokens are merged: before a layer (`merge_before`) or between a layer's attention and its MLP
(`merge_inside`). It sets `bias` (added to the logits of the present keys) and `unmerge` (from the present patch tokens
to all N). Everything else is here: finding encoders, hooks, decoders, hidden states, undoing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ailurus_hf.clustering.rows import image_rows
from ailurus_hf.errors import AiluRusError, UnsupportedModelError
from ailurus_hf.hooks import Hooks
from ailurus_hf.vision.adapters import relative_bias_modules
from ailurus_hf.vision.apply import ATTRIBUTE
from ailurus_hf.vision.backend import parameters_of, use_attention
from ailurus_hf.vision.discovery import FoundEncoder, find_encoders

RESTORES_AT = ("backbone", "decoder")
Unmerge = Callable[[Tensor], Tensor]


class Peer:
    """One method on one encoder. `restore_at`: unmerge after the backbone, or after a decoder on tokens."""

    def __init__(self, found: FoundEncoder, restore_at: str = "backbone") -> None:
        if restore_at not in RESTORES_AT:
            raise AiluRusError(f"restore_at must be one of {RESTORES_AT}, got {restore_at!r}")
        _check_plain(found)
        self.found, self.layers, self.prefix = found, found.layers, found.prefix
        self.through_decoder = restore_at == "decoder" and found.decoder is not None
        self.hooks = Hooks()
        # Of the last forward: patch tokens after each layer, the first entry before all of them.
        self.token_counts: list[int] = []

    def add_hooks(self) -> None:
        """The method's own hooks."""
        raise NotImplementedError

    def begin(self) -> None:
        """Called at the start of a forward; `grid` and `num_tokens` are known then."""

    # What methods use.

    def check_location(self, location: int) -> None:
        """Raises AiluRusError where there is no such layer."""
        if not 0 <= location < len(self.layers):
            raise AiluRusError(f"location must be 0 to {len(self.layers) - 1}, got {location}")

    def merge_before(self, index: int, merge: Callable[[Tensor], Tensor]) -> None:
        """Patch tokens Tensor[B, N, C] through `merge` before layer `index` (0: the embeddings)."""

        def hook(layer: nn.Module, args: tuple, kwargs: dict) -> tuple:
            prefix, tokens = self.split(args[0])
            merged = merge(tokens)
            if merged is not tokens and index == 0:
                # transformers records the first layer's input, which is merged by then, as the embeddings.
                self.history[0] = lambda _: tokens
            return (args[0] if merged is tokens else torch.cat([prefix, merged], 1), *args[1:]), kwargs

        self.hooks.pre_forward(self.layers[index], hook)

    def merge_inside(self, index: int, merge: Callable[[Tensor, int], Tensor]) -> None:
        """The whole sequence Tensor[B, L, C] through `merge(sequence, index)` between attention and MLP of a layer.

        The layer adds its MLP's output to what it had before the merge. So the MLP's output is held back, a zero goes
        in its place, and the sum of the right two becomes the layer's output.
        """
        held: dict[str, Tensor] = {}

        def before_mlp(norm: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
            held.clear()
            merged = merge(args[0], index)
            if merged is args[0]:
                return None
            held["merged"] = merged
            return (merged,), kwargs

        def after_mlp(mlp: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if not held:
                return None
            held["output"] = output
            return output.new_zeros(())

        def after_layer(layer: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            return held["merged"] + held.pop("output") if held else None

        layer = self.layers[index]
        norm, last = _mlp_parts(layer)
        self.hooks.pre_forward(norm, before_mlp)
        self.hooks.post_forward(last, after_mlp)
        # Prepended, so that what records hidden states sees the merged ones.
        self.hooks.post_forward(layer, after_layer, prepend=True)

    def watch(self, index: int, name: str) -> dict[str, Tensor]:
        """A dict whose "output" is the last output of a layer's submodule, such as "k_proj": Tensor[B, L, C]."""
        seen: dict[str, Tensor] = {}
        modules = [m for path, m in self.layers[index].named_modules() if path.rsplit(".", 1)[-1] == name]
        if len(modules) != 1:
            raise UnsupportedModelError(f"{type(self.layers[index]).__name__} has {len(modules)} {name}, not one")

        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            seen["output"] = output

        self.hooks.post_forward(modules[0], hook)
        return seen

    def split(self, sequence: Tensor) -> tuple[Tensor, Tensor]:
        return sequence[:, : self.prefix], sequence[:, self.prefix :]

    # The forward.

    def install(self) -> None:
        encoder = self.found.encoder
        self.mask_position = parameters_of(self.layers[0]).index("attention_mask")
        self.hooks.pre_forward(encoder, self._begin)
        for location, layer in enumerate(self.layers, start=1):
            restores = location == len(self.layers) and not self.through_decoder
            hook = self._restore if restores else self._remember(location)
            self.hooks.post_forward(layer, hook, prepend=True)
        # Its hooks after layers are prepended too, and so run before those above.
        self.add_hooks()
        # After the method's own: a merge before a layer changes the length that the bias has to have.
        for layer in self.layers:
            self.hooks.pre_forward(layer, self._add_bias)
        self.hooks.post_forward(encoder, self._finish)
        layers: list[nn.Module] = list(self.layers)
        if self.through_decoder:
            assert self.found.decoder is not None
            for layer in self.found.decoder_layers:
                self.hooks.pre_forward(layer, self._add_decoder_bias)
            self.hooks.post_forward(self.found.decoder, self._finish_decoder)
            layers += self.found.decoder_layers
        use_attention(self.hooks, layers)

    def remove(self) -> None:
        self.hooks.remove()

    def _begin(self, encoder: nn.Module, args: tuple, kwargs: dict) -> None:
        pixel_values = args[0] if args else kwargs["pixel_values"]
        self.grid = tuple(self.found.family.grid(encoder, pixel_values))
        self.num_tokens = self.grid[0] * self.grid[1]
        self.bias: Tensor | None = None
        self.unmerge: Unmerge | None = None
        self.history: dict[int, Unmerge | None] = {}
        self.token_counts = [self.num_tokens]
        self.begin()

    def _add_bias(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        return self._with_bias(args, kwargs, 0) if self.bias is not None else None

    def _add_decoder_bias(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        return self._with_bias(args, kwargs, self.found.decoder_suffix, decoder=True) if self.bias is not None else None

    def _with_bias(self, args: tuple, kwargs: dict, suffix: int, decoder: bool = False) -> tuple[tuple, dict]:
        assert self.bias is not None
        bias = F.pad(self.bias, (0 if decoder else self.prefix, suffix))[:, None, None].to(args[0].dtype)
        if len(args) > self.mask_position:
            return (*args[: self.mask_position], bias, *args[self.mask_position + 1 :]), kwargs
        return args, {**kwargs, "attention_mask": bias}

    def _remember(self, location: int) -> Callable:
        def hook(layer: nn.Module, args: tuple, output: Tensor) -> None:
            self.history[location] = self.unmerge
            self.token_counts.append(output.shape[1] - self.prefix)

        return hook

    def _restore(self, layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
        self.token_counts.append(output.shape[1] - self.prefix)
        return self._unmerged(output, self.unmerge)

    def _unmerged(self, sequence: Tensor, unmerge: Unmerge | None) -> Tensor:
        if unmerge is None:
            return sequence
        prefix, tokens = self.split(sequence)
        return torch.cat([prefix, self.back(tokens, unmerge)], 1)

    def back(self, tokens: Tensor, unmerge: Unmerge) -> Tensor:
        """Every unmerging goes through here, so that it can be timed."""
        return unmerge(tokens)

    def _finish(self, encoder: nn.Module, args: tuple, output: Any) -> Any:
        states = getattr(output, "hidden_states", None)
        if states is not None:
            # What is around the encoder may read some of them alone (a pyramid): the rest stays as short as it is.
            read = range(len(states)) if self.found.reader is None else self._read_states()
            output["hidden_states"] = tuple(
                state if state is None or location not in read else self._unmerged(state, self.history.get(location))
                for location, state in enumerate(states)
            )
        return output

    def _read_states(self) -> frozenset[int]:
        assert self.found.reader is not None
        module, reader = self.found.reader
        return frozenset(reader.reads(module))

    def _finish_decoder(self, decoder: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output if self.unmerge is None else self.back(output, self.unmerge)


class Applied:
    """A peer on a model. `undo`, or the end of a `with`, leaves no trace of it."""

    def __init__(self, peers: Sequence[Peer]) -> None:
        self.peers = list(peers)

    def undo(self) -> None:
        for peer in self.peers:
            peer.remove()

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def attach(model: nn.Module, method: type[Peer], **settings: Any) -> Applied:
    """Puts a method on every encoder in a model. Refused where AiluRus or a peer is on already."""
    peers = [method(found, **settings) for found in find_encoders(model)]
    for peer in peers:
        encoder = peer.found.encoder
        owners = [getattr(hook, "__self__", None) for hook in encoder._forward_pre_hooks.values()]
        if ATTRIBUTE in vars(encoder) or any(isinstance(owner, Peer) for owner in owners):
            raise AiluRusError(f"{type(encoder).__name__} is reduced already: undo that first")
    applied = Applied([])
    try:
        for peer in peers:
            applied.peers.append(peer)
            peer.install()
    except Exception:
        applied.undo()
        raise
    return applied


def copy_back(source: Tensor) -> Unmerge:
    """The unmerging that gives each of N cells the value of the token it belongs to now: LongTensor[B, N]."""
    return lambda tokens: image_rows(tokens, source)


def _check_plain(found: FoundEncoder) -> None:
    """Peers are written for tokens with a prefix and a mask, and nothing else beside them."""
    family, parameters = found.family, parameters_of(found.layers[0])
    around = [found.suffix, family.queries, family.reads, family.between, family.prepare]
    beside = "position_embeddings" in parameters or relative_bias_modules(found.encoder)
    if any(around) or beside or "attention_mask" not in parameters:
        raise UnsupportedModelError(f"the peers run on ViTs without anything beside tokens, not on {family.name}")


def _mlp_parts(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The norm before a layer's MLP, and the last module before the MLP's output is added."""
    parts = dict(layer.named_children())
    for norm, last in (("norm2", "layer_scale2"), ("layernorm_after", "mlp"), ("layer_norm2", "mlp")):
        if norm in parts and last in parts:
            return parts[norm], parts[last]
    raise UnsupportedModelError(f"the MLP of {type(layer).__name__} is not known: it has {', '.join(parts)}")


def two_cells(cells: Sequence[int]) -> tuple[int, int]:
    """(h, w), the grid that is left; raises AiluRusError where it is none."""
    if len(cells) != 2 or min(cells) < 1:
        raise AiluRusError(f"cells must be two numbers from 1 on, got {tuple(cells)}")
    return cells[0], cells[1]
