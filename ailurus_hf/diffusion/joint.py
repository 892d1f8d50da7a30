"""Transformers whose attention is joint over image and text tokens (SD3, Flux): the image's run on representatives.

scope="blocks": image tokens are merged behind block `cluster_location` and restored after the last; each adds what its
representative gained. scope="attention": in these blocks queries, keys and values of the image are merged after they were
rotated. Text tokens stay as they are. Either way one processor of ours serves all layers: diffusers' own give SD3 no mask, and Flux no
rotary embedding that differs from image to image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from ..clusters import TokenClusters
from ..errors import AiluRusError, UnsupportedModelError
from .backend import JOINT_PROCESSORS, FluxTransformer2DModel, attend, joint_block_flops, self_attentions
from .reducer import Attending, NetworkReducer
from .stacks import with_argument
from .store import Run

# cos and sin of each token's angles, Tensor[L, D] or [B, L, D] each.
Rotary = tuple[Tensor, Tensor]


@dataclass
class Arriving:
    """A forward that is to be reduced and has not met the first block to be. ids: of text and image (Flux), Tensor[L, 3] each."""

    grid: tuple[int, ...]
    ids: tuple[Tensor, Tensor] | None


@dataclass
class Merged:
    """A forward between its first block and its last one.

    kept: the image tokens [B, N, C]. start: the representatives that the gain is counted from.
    """

    clusters: TokenClusters
    kept: Tensor
    start: Tensor
    rotary: Rotary | None


class JointReducer(NetworkReducer):
    """What reduces one SD3 or Flux transformer."""

    # The argument of its forward that processors are given more with; the processors that ours can stand in for.
    KWARGS = "joint_attention_kwargs"
    PROCESSORS: tuple[type, ...] = JOINT_PROCESSORS
    block_flops = staticmethod(joint_block_flops)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.config.levels:
            raise AiluRusError(
                f"{type(self.network).__name__} has one resolution: leave levels out, got {self.config.levels!r}"
            )
        self.is_flux = isinstance(self.network, FluxTransformer2DModel)
        self.text_tokens = 0
        # The last tensors that were read, held weakly: img_ids and its grid; a schedule and the img_ids it came with.
        self._grid_of: tuple[Any, int, tuple[int, int]] | None = None
        self._schedule_of: tuple[Any, Any] | None = None
        for name, layer in self_attentions(self.stacks).items():
            processor = layer.processor
            # A subclass may do something else.
            if type(processor) not in self.PROCESSORS and not isinstance(processor, JointProcessor):
                raise UnsupportedModelError(
                    f"{name} runs on a {type(processor).__name__}: it can be reduced where it runs on one of "
                    f"{', '.join(kind.__name__ for kind in self.PROCESSORS)} (no IP-Adapter, no perturbed attention)"
                )

    def _new_processor(self) -> JointProcessor:
        return JointProcessor(self)

    def install(self) -> None:
        super().install()
        self.set_processor(self._new_processor())
        # On all of them: the first one may be skipped.
        for block in self.stacks[0].blocks[self.first_reduced(self.stacks[0]) :]:
            self.hooks.pre_forward(block, self.merge)
        if self.config.scope == "blocks":
            self.hooks.pre_forward(self.network.norm_out, self.restore)  # type: ignore[arg-type]

    def begin(self, network: nn.Module, args: tuple, kwargs: dict) -> None:
        given = self.call.argument(self.KWARGS, args, kwargs) or {}
        ids = self._ids(args, kwargs) if self.is_flux else None
        grid = self._grid(self.call.latents(args, kwargs), ids, given.get("grid"))
        super().begin(network, args, kwargs)
        run, stack = self.store.run, self.stacks[0]
        assert run is not None
        run.latent_side = stack.patch * max(grid)
        if self.without_processor():
            # Some layers would not weigh the representatives, so none runs on them.
            self.records[stack.name].unreduced(math.prod(grid))
            return
        if self.num_clusters(run, grid) == math.prod(grid):
            self.leave(run, stack, math.prod(grid))
            return
        self._refuse_what_cannot_follow(given, args, kwargs)
        if not torch.compiler.is_compiling():
            self.text_tokens = self.call.argument("encoder_hidden_states", args, kwargs).shape[1]
        run.current = Arriving(grid, ids)

    def _refuse_what_cannot_follow(self, given: dict, args: tuple, kwargs: dict) -> None:
        for name in ("attention_mask", "ip_adapter_image_embeds", "ip_hidden_states", "ip_adapter_masks"):
            if given.get(name) is not None:
                raise AiluRusError(f"{name} in {self.KWARGS} cannot follow merged tokens: call without it")
        if self.processor._parallel_config is not None:
            raise AiluRusError(
                "context parallelism cuts the sequence, of which AiluRus needs all: switch one of them off"
            )
        if torch.is_grad_enabled() and getattr(self.network, "gradient_checkpointing", False):
            raise AiluRusError("gradient checkpointing runs blocks again on their own: train without it")
        if self.config.scope == "attention":
            return
        for name in ("block_controlnet_hidden_states", "controlnet_block_samples", "controlnet_single_block_samples"):
            if self.call.argument(name, args, kwargs) is not None:
                raise AiluRusError(
                    f"{name} are added to all tokens between blocks, where there are only representatives: use "
                    "scope='attention', or no ControlNet"
                )
        if getattr(self.network, "is_cache_enabled", False):
            raise AiluRusError(
                "a cache of diffusers keeps what blocks did to another step's representatives: disable_cache() first, or "
                "use scope='attention'"
            )

    # Where a forward stands: its grid, and its denoising step.

    def _ids(self, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
        """Places of text and image tokens, Tensor[T, 3] and [N, 3]; with a batch they were in older versions."""
        text, image = (self.call.argument(name, args, kwargs) for name in ("txt_ids", "img_ids"))
        return (text[0] if text.ndim == 3 else text), (image[0] if image.ndim == 3 else image)

    def _grid(self, latents: Tensor, ids: tuple[Tensor, Tensor] | None, given: Any) -> tuple[int, ...]:
        """The grid of the image tokens. given: what the caller says that it is."""
        if given is not None and len(given) != 2:
            raise AiluRusError(f"grid in joint_attention_kwargs must be (H, W), got {given}")
        if ids is None:
            height, width = (int(side) // self.stacks[0].patch for side in latents.shape[-2:])
            if given is not None and tuple(given) != (height, width):
                raise AiluRusError(f"grid in joint_attention_kwargs must be {(height, width)}, got {tuple(given)}")
            return height, width
        if given is not None:
            height, width = (int(side) for side in given)
        elif torch.compiler.is_compiling():
            raise AiluRusError(
                "a compiled network cannot read its grid from img_ids: call it with "
                'joint_attention_kwargs={"grid": (H, W)}, the rows and columns of tokens (a 16th of the picture\'s sides)'
            )
        else:
            height, width = self._grid_of_ids(ids[1])
        if height * width != latents.shape[1]:
            raise AiluRusError(
                f"grid {(height, width)} has {height * width} places, but there are {latents.shape[1]} image tokens"
            )
        return height, width

    def _grid_of_ids(self, ids: Tensor) -> tuple[int, int]:
        """Reads the grid from Tensor[N, 3]. That waits for the device, so once for a tensor: pipelines make one an image."""
        version = 0 if ids.is_inference() else ids._version
        known = self._grid_of
        if known is None or known[0]() is not ids or known[1] != version:
            self._grid_of = known = ref(ids), version, grid_from_ids(ids)
        return known[2]

    def _schedule(self, args: tuple, kwargs: dict) -> tuple[Any, Any]:
        timestep, pipeline = super()._schedule(args, kwargs)
        if pipeline is not None or not self.is_flux or self.pipeline is None or torch.compiler.is_compiling():
            return timestep, pipeline
        # Flux's pipelines scale the timestep, so it is no view of the schedule any more; their scheduler counts steps.
        pipeline = self.pipeline()
        scheduler = getattr(pipeline, "scheduler", None)
        timesteps, step = getattr(scheduler, "timesteps", None), getattr(scheduler, "step_index", None)
        if step is None:
            step = getattr(scheduler, "begin_index", None) or 0
        if not hasattr(pipeline, "_num_timesteps") or timesteps is None or step >= len(timesteps):
            return timestep, None
        # One img_ids a generation: with another, it is not this pipeline that calls.
        image_ids = self.call.argument("img_ids", args, kwargs)
        if self._schedule_of is None or self._schedule_of[0]() is not timesteps:
            self._schedule_of = ref(timesteps), ref(image_ids)
        return (timesteps[step], pipeline) if self._schedule_of[1]() is image_ids else (timestep, None)

    # scope="blocks"; with "attention", `merge` only says that processors merge from here on.

    def merge(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        run = self.store.run
        if run is None:
            if self.config.scope == "attention":
                return None
            raise AiluRusError(
                "a transformer block was called outside a forward of its network. Where blocks are compiled one by one, "
                "compile the network instead, or use scope='attention'"
            )
        if not isinstance(run.current, Arriving):
            return None
        arriving = run.current
        if self.config.scope == "attention":
            run.current = Attending(self.stacks[0], arriving.grid)
            return None
        tokens = args[0] if args else kwargs["hidden_states"]
        clusters = self.assign(run, self.stacks[0], arriving.grid, tokens)
        assert isinstance(clusters, TokenClusters)
        merged = clusters.merge(tokens)
        run.current = Merged(clusters, tokens, merged, self._rotary(clusters, arriving))
        return with_argument(args, kwargs, 0, "hidden_states", merged)

    def restore(self, norm: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        run = self.store.run
        if run is None or not isinstance(run.current, Merged):
            return None
        state, run.current = run.current, None
        tokens = args[0] if args else kwargs["x"]
        restored = state.kept + state.clusters.unmerge(tokens - state.start)
        return with_argument(args, kwargs, 0, "x", restored)

    def _rotary(self, clusters: TokenClusters, arriving: Arriving) -> Rotary | None:
        """Flux's own embedding of text tokens and of each cluster's centroid, Tensor[B, T + M, D] each; SD3 has none."""
        if arriving.ids is None:
            return None
        (text_ids, image_ids), batch = arriving.ids, clusters.assignment.shape[0]
        centroids = clusters.merge(image_ids.float().expand(batch, -1, -1))
        ids = torch.cat([text_ids.float().expand(batch, -1, -1), centroids], 1)
        cos, sin = self.network.pos_embed(ids.flatten(0, 1))  # type: ignore[operator]
        return cos.unflatten(0, ids.shape[:2]), sin.unflatten(0, ids.shape[:2])

    def flops(self) -> tuple[float, float] | tuple[None, None]:
        """FLOPs of all blocks on one image in the last forward, without and with reduction; None before the first."""
        stack = self.stacks[0]
        record = self.records[stack.name]
        tokens, clusters = record.last_tokens, record.last_clusters_count
        if tokens is None or clusters is None:
            return None, None
        others = tokens if self.config.scope == "attention" else clusters
        queries = tokens if self.config.reduce == "kv" else clusters
        text = self.text_tokens
        first = self.first_reduced(stack)
        whole = [self.block_flops(block, tokens, tokens, tokens, text) for block in stack.blocks]
        reduced = [self.block_flops(block, queries, clusters, others, text) for block in stack.blocks[first:]]
        return sum(whole), sum(whole[:first]) + sum(reduced)


class JointProcessor:
    """Joint attention of SD3 and Flux whose image keys are weighted by how many tokens they stand for.

    Where nothing is reduced it does what JointAttnProcessor2_0 and FluxAttnProcessor do.
    """

    # Where diffusers' set_attention_backend and context parallelism write to.
    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(self, reducer: JointReducer) -> None:
        self.reducer = reducer

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
        grid: Any = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """hidden_states: the image's, Tensor[B, L, C], or text and image together where encoder_hidden_states is None.

        grid is read at the start of a forward; here it is only no surprise.
        """
        run, scope = self.reducer.store.run, self.reducer.config.scope
        clusters: TokenClusters | None = None
        if run is not None and isinstance(run.current, Merged):
            clusters, image_rotary_emb = run.current.clusters, run.current.rotary
        elif run is not None and isinstance(run.current, Attending):
            clusters = self._clusters(run, hidden_states)
        query, key, value = self._projected(attn, hidden_states, encoder_hidden_states)
        if image_rotary_emb is not None:
            query, key = rotated(query, image_rotary_emb), rotated(key, image_rotary_emb)
        bias = None
        if clusters is not None:
            attention_mask = None
            if scope == "attention":
                key, value = self._merged(key, clusters), self._merged(value, clusters)
                if self.reducer.config.reduce == "qkv":
                    query = self._merged(query, clusters)
            text = key.shape[1] - clusters.num_clusters
            bias = clusters.log_counts(prefix=text) if self.reducer.is_flux else clusters.log_counts(suffix=text)
        parts = (part.transpose(1, 2) for part in (query, key, value))
        out = attend(*parts, mask=attention_mask, key_bias=bias, backend=self._attention_backend)
        out = out.transpose(1, 2).flatten(2).to(query.dtype)
        if clusters is not None and scope == "attention" and self.reducer.config.reduce == "qkv":
            of_text, of_image = self._split(out, clusters.num_clusters)
            out = self._joined(of_text, clusters.unmerge(of_image))
        return self._output(attn, out, encoder_hidden_states)

    def _clusters(self, run: Run, hidden_states: Tensor) -> TokenClusters | None:
        grid = run.current.grid
        clusters = self.reducer.assign_current(self._split(hidden_states, math.prod(grid))[1])
        assert clusters is None or isinstance(clusters, TokenClusters)
        return clusters

    def _projected(self, attn: Any, image: Tensor, text: Tensor | None) -> tuple[Tensor, ...]:
        """Query, key and value of all tokens in the network's order, Tensor[B, L, heads, D]."""
        parts = [part.unflatten(2, (attn.heads, -1)) for part in (attn.to_q(image), attn.to_k(image), attn.to_v(image))]
        norms = (attn.norm_q, attn.norm_k, None)
        parts = [part if norm is None else norm(part) for part, norm in zip(parts, norms)]
        if text is None:
            return tuple(parts)
        added = [
            part.unflatten(2, (attn.heads, -1))
            for part in (attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text))
        ]
        norms = (attn.norm_added_q, attn.norm_added_k, None)
        added = [part if norm is None else norm(part) for part, norm in zip(added, norms)]
        return tuple(self._joined(of_text, of_image) for of_text, of_image in zip(added, parts))

    def _output(self, attn: Any, out: Tensor, text: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        if text is None:
            # Flux's single blocks project later, together with the MLP.
            return out if getattr(attn, "pre_only", False) else attn.to_out[1](attn.to_out[0](out))
        of_text, of_image = self._split(out, out.shape[1] - text.shape[1])
        if not attn.context_pre_only:
            of_text = attn.to_add_out(of_text)
        return attn.to_out[1](attn.to_out[0](of_image)), of_text

    # SD3 has the image first, Flux the text.

    def _split(self, tokens: Tensor, image: int) -> tuple[Tensor, Tensor]:
        """Text and image of Tensor[B, T + image, ...]."""
        text = tokens.shape[1] - image
        if self.reducer.is_flux:
            return tokens[:, :text], tokens[:, text:]
        return tokens[:, image:], tokens[:, :image]

    def _joined(self, text: Tensor, image: Tensor) -> Tensor:
        return torch.cat([text, image] if self.reducer.is_flux else [image, text], 1)

    def _merged(self, part: Tensor, clusters: TokenClusters) -> Tensor:
        """Tensor[B, T + N, heads, D] with the image merged."""
        text, image = self._split(part, clusters.num_tokens)
        return self._joined(text, clusters.merge(image.flatten(2)).unflatten(2, part.shape[2:]))


def rotated(tokens: Tensor, rotary: Rotary) -> Tensor:
    """Tensor[B, L, heads, D] rotated as diffusers' apply_rotary_emb does, which knows no batch of angles."""
    cos, sin = (part.unsqueeze(-2).to(tokens.device) for part in rotary)
    real, imaginary = tokens.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], -1).flatten(-2)
    return (tokens.float() * cos + turned.float() * sin).to(tokens.dtype)


def grid_from_ids(ids: Tensor) -> tuple[int, int]:
    """(H, W) of the row and column of each image token, Tensor[N, 3]; raises AiluRusError where they are no one grid."""
    places = ids.detach().cpu()
    width = int((places[:, 1] == places[0, 1]).sum())
    height = len(places) // width
    if height * width == len(places):
        rows = places.unflatten(0, (height, width))
        same_image = (places[:, 0] == places[0, 0]).all()
        if same_image and (rows[:, :, 1] == rows[:, :1, 1]).all() and (rows[:, :, 2] == rows[:1, :, 2]).all():
            return height, width
    raise AiluRusError(
        f"the {len(places)} img_ids are not the rows and columns of one image: reference images beside it (Flux Kontext) "
        "cannot be reduced"
    )
