"""What `autotune` knows of diffusers pipelines: their prompts, their settings, and how near pictures are."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..choices import NetworkKind
from ..config import AiluRusDiffusionConfig
from ..errors import AiluRusError
from ..presets import DiffusionPreset
from . import agreement
from .search import Candidate

PRESETS: tuple[DiffusionPreset, ...] = ("fast", "balanced", "faithful")
KEEP_RATIOS = (0.75, 0.5, 0.35, 0.25)
REFRESH = (1, 2, 4)
FULL_EVERY = (3, 5)
INNER_EVERY = (2, 3)


class PipelineSubject:
    """A pipeline and its prompts; each has a seed of its own, the same for all settings.

    Args:
        pipeline: a diffusers pipeline that makes pictures.
        prompts: prompts, or mappings of the call's arguments.
        generate: further arguments of all calls.
        score: of pictures, Tensor[B, 3, H, W] in [0, 1], and the number of their prompt; None: they are compared with
            the plain ones.
    """

    def __init__(
        self,
        pipeline: Any,
        prompts: Sequence[Any],
        generate: Mapping[str, Any],
        score: Callable[[Any, int], float] | None = None,
    ) -> None:
        if not callable(pipeline) or not hasattr(pipeline, "components"):
            raise AiluRusError(f"give a transformers model or a diffusers pipeline, got {type(pipeline).__name__}")
        self.target, self.score = pipeline, score
        self.calls = [dict(each) if isinstance(each, Mapping) else {"prompt": each} for each in prompts]
        self.generate = {"output_type": "pt", **generate}
        self.num_inputs, self.device = len(self.calls), torch.device(pipeline.device)
        self.precision = str(pipeline.dtype).removeprefix("torch.")
        self.loss_means = agreement.MEANING["pictures"] if score is None else "what the metric falls by"
        taken = inspect.signature(type(pipeline).__call__).parameters
        wrong = sorted({name for call in [self.generate, *self.calls] for name in call} - taken.keys())
        if wrong:
            raise AiluRusError(f"{type(pipeline).__name__} takes no {', '.join(wrong)}")

    def run(self, index: int) -> Tensor:
        call = {"generator": torch.Generator().manual_seed(index), **self.generate, **self.calls[index]}
        made = self.target(**call)
        pictures = made.images if hasattr(made, "images") else made.frames
        return torch.as_tensor(pictures).flatten(0, -4)

    def loss(self, plain: Tensor, reduced: Tensor, index: int) -> float:
        if self.score is not None:
            return self.score(plain, index) - self.score(reduced, index)
        return agreement.loss(plain, reduced)

    def ideal(self) -> float | None:
        return None

    def first(self) -> list[Candidate]:
        """Every keep ratio, and the presets."""
        configs = [AiluRusDiffusionConfig(keep_ratio=keep, refresh_every=2) for keep in KEEP_RATIOS]
        network: NetworkKind = "transformer" if getattr(self.target, "transformer", None) is not None else "unet"
        named = [Candidate(AiluRusDiffusionConfig.preset(name, network), f"preset {name!r}") for name in PRESETS]
        return [Candidate(config, label_of(config)) for config in configs] + named

    def variants(self, candidate: Candidate) -> list[Candidate]:
        """Other levels, attention alone, clusters by resolution, other refreshes, full or inner steps, tokens early or
        late.
        """
        config: Any = candidate.config
        keep = config.keep_ratio
        changes: dict[str, dict[str, Any]] = {f"refresh every {n}": {"refresh_every": n} for n in REFRESH}
        drawn_on = config.extrapolate and config.inner_every is not None
        alone = {"scope": "attention", "full_every": None, "extrapolate": drawn_on, "between": "representatives"}
        changes |= {"attention": alone, "by resolution": {"cluster_per": "resolution"}}
        changes |= {"first steps": {"unreduced_first_steps": 2}, "last steps": {"unreduced_last_steps": 2}}
        changes |= {"more early": {"step_factors": (1.5, 1.0, 0.5)}, "more late": {"step_factors": (0.5, 1.0, 1.5)}}
        if getattr(self.target, "unet", None) is not None:
            inner = {"full_every": None, "between": "representatives", "extrapolate": True, "unreduced_first_steps": 3}
            changes |= {f"inner layers every {n}": {"inner_every": n, **inner} for n in INNER_EVERY}
        if config.has_scope("blocks") and config.inner_every is None:
            kept_alone = {"between": "nothing", "extrapolate": True}
            changes |= {f"full every {n}": {"full_every": n} for n in FULL_EVERY}
            if config.projections == "all":
                changes |= {f"full every {n}, nothing between": {"full_every": n, **kept_alone} for n in FULL_EVERY}
        if isinstance(keep, float):  # only where there are most tokens, and fewer of these than of the next level's
            changes |= {
                "one level": {"keep_ratio": {"largest": keep}},
                "two levels": {"keep_ratio": {1: keep, 2: min(1.0, 2 * keep)}},
            }
        every = {way: dataclasses.replace(config, **change) for way, change in changes.items()}
        return [Candidate(each, label_of(each), way=way) for way, each in every.items() if each != config]


def label_of(config: Any) -> str:
    """A setting in words: what differs from the defaults."""
    defaults = AiluRusDiffusionConfig()
    given = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(defaults, field.name)
    }
    return ", ".join(f"{name} {value}" for name, value in given.items()) or "the defaults"
