"""What `autotune` knows of transformers models: their inputs, their settings, and what their outputs lose."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..apply import ailurus_status
from ..choices import Restore
from ..config import AiluRusConfig
from ..errors import AiluRusError, UnsupportedModelError
from ..presets import VisionPreset
from ..vision.discovery import find_encoders
from . import agreement
from .flops import counted_flops
from .search import Candidate

PRESETS: tuple[VisionPreset, ...] = ("dense", "classification")
KEEP_RATIOS = (0.75, 0.5, 0.35, 0.25, 0.15)
CLUSTERINGS = ("local_kmeans", "ward", "pairs")
# How tokens are restored where each has a prediction of its own, and where the image has one.
RESTORES: dict[bool, tuple[Restore, ...]] = {True: ("residual", "smooth"), False: ("residual", "copy")}


class ModelSubject:
    """A model and its inputs.

    Args:
        model: a transformers model.
        inputs: images, tensors, or mappings of arguments.
        processor: makes inputs of images.
        score: of an output and the number of its input; None: outputs are compared with the plain ones.
        forward: runs the model on a mapping of arguments, where that is more than calling it.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[Any],
        processor: Any = None,
        score: Callable[[Any, int], float] | None = None,
        forward: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        self.target, self.score = model, score
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.precision = str(self.dtype).removeprefix("torch.")
        self.inputs = [self._prepared(each, processor) for each in inputs]
        self.num_inputs = len(self.inputs)
        self.forward = forward or (lambda arguments: model(**arguments))
        self.loss_means = "what the metric falls by" if score is not None else ""
        self._is_dense = True
        self._flops: int | None = None
        self._is_counted = False

    def _prepared(self, given: Any, processor: Any) -> dict[str, Any]:
        if isinstance(given, Tensor):
            given = {"pixel_values": given}
        elif not isinstance(given, Mapping):
            if processor is None:
                raise AiluRusError(
                    f"inputs of {type(given).__name__} need processor=, which makes a model's inputs of them"
                )
            given = processor(images=given, return_tensors="pt")
        return {name: self._placed(value) for name, value in given.items()}

    def _placed(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(self.device, self.dtype if value.is_floating_point() else None)

    # Not inference_mode: tables that a model makes once, as BEiT's, would be of no use to a training in this process.
    @torch.no_grad()
    def run(self, index: int) -> Any:
        output = self.forward(self.inputs[index])
        if not self._is_counted and not ailurus_status(self.target).active:
            self._flops, self._is_counted = self._counted(self.inputs[index]), True
        return output

    def loss(self, plain: Any, reduced: Any, index: int) -> float:
        if self.score is not None:
            return self.score(plain, index) - self.score(reduced, index)
        kind = agreement.kind_of(plain)
        self.loss_means = agreement.MEANING[kind]
        logits = getattr(plain, "logits", None)
        self._is_dense = kind != "labels" or logits is None or logits.ndim > 2
        return agreement.loss(plain, reduced)

    def _counted(self, given: dict[str, Any]) -> int | None:
        """FLOPs of one image; None where torch cannot count them on shapes alone."""
        arguments = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        try:
            return counted_flops(self.target, arguments) // len(next(iter(arguments.values())))
        except Exception:  # not every model runs on shapes alone
            return None

    def ideal(self) -> float | None:
        saved = ailurus_status(self.target).saved_flops
        if self._flops is None or saved >= self._flops:
            return None
        return self._flops / (self._flops - saved)

    def first(self) -> list[Candidate]:
        """Every location and keep ratio, in the plainest way, and the presets."""
        try:
            depth = min(len(found.layers) for found in find_encoders(self.target))
        except UnsupportedModelError:  # stages or windows, or nothing at all, which is told by the first candidate
            depth = 4
        locations = sorted({min(at, depth - 1) for at in (1, 2, 3, depth // 3, depth // 2)} - {0})
        configs = [AiluRusConfig(cluster_location=at, keep_ratio=keep) for at in locations for keep in KEEP_RATIOS]
        named = [Candidate(AiluRusConfig.preset(name), f"preset {name!r}") for name in PRESETS]
        return [Candidate(config, label_of(config)) for config in configs] + named

    def variants(self, candidate: Candidate) -> list[Candidate]:
        """Other clusterings and restores."""
        config = candidate.config
        if not isinstance(config, AiluRusConfig) or candidate.label.startswith("preset"):
            return []
        every = [
            dataclasses.replace(config, clustering=clustering, restore=restore)
            for clustering in CLUSTERINGS
            for restore in RESTORES[self._is_dense]
        ]
        return [
            Candidate(each, label_of(each), way=f"{each.clustering}, {each.restore}")
            for each in every
            if each != config
        ]


def label_of(config: AiluRusConfig) -> str:
    """A setting in words: "0.25 after layer 2, ward, smooth"."""
    keep = config.keep_ratio if config.num_clusters is None else config.num_clusters
    clustering = config.clustering if isinstance(config.clustering, str) else config.to_dict()["clustering"]["name"]
    layers = "layers" if isinstance(config.cluster_location, tuple) else "layer"
    return f"{_listed(keep)} after {layers} {_listed(config.cluster_location)}, {clustering}, {config.restore}"


def _listed(values: Any) -> str:
    """A number, or several with "and" between them."""
    return " and ".join(map(str, values)) if isinstance(values, tuple) else str(values)
