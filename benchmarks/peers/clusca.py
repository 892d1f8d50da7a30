"""ClusCa (Zheng et al. 2025, arXiv 2509.10312): between full steps, one token a cluster is computed.

The first three steps and every `every`-th after them are full. They keep what each attention and each MLP gave, and the
difference to the full step before per step; and k-means, from the means of the full step before, clusters the image
tokens after the last block (L1 distances). The steps between take attention as it is forecast, value and difference
times the steps since. In each MLP one token drawn from each cluster is computed: its own value is replaced, all tokens
of its cluster move to it by `share`, and the forecast goes on from there.

By the paper and the authors' DiT (github.com/Shenyi-Z/Cache4Diffusion); their Flux puts in what goes into the MLP and
not what comes out, which is not followed. They leave attention to the forecast, and text, which has no clusters here,
is left to it too. Blocks are those of SD3, PixArt and DiT: attention in `attn`, `attn1` and `attn2`, the image's MLP
in `ff`, the text's in `ff_context`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ailurus_hf.hooks import Hooks

from .steps import Steps, replace_forward, rows

FULL_AT_FIRST = 3
ROUNDS = 10
FORECAST = ("attn", "attn1", "attn2", "ff_context")


def k_means(tokens: Tensor, means: Tensor, rounds: int = ROUNDS) -> tuple[Tensor, Tensor]:
    """Clusters by L1 distance, LongTensor[B, N], and their means. An empty cluster's mean stays where it was."""
    count = means.shape[1]
    for _ in range(rounds):
        labels = torch.cdist(tokens, means, p=1).argmin(2)
        members = F.one_hot(labels, count).to(tokens.dtype).transpose(1, 2)
        sizes = members.sum(2, keepdim=True)
        moved = torch.where(sizes > 0, members @ tokens / sizes.clamp(min=1), means)
        if torch.allclose(moved, means, rtol=1e-4):
            break
        means = moved
    return labels, means


def drawn(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """One token of each cluster, LongTensor[B, count]; any token for an empty one."""
    chance = torch.rand(labels.shape, generator=generator).to(labels.device)
    inside = labels[:, None] == torch.arange(count, device=labels.device)[:, None]
    return torch.where(inside, chance[:, None], -1.0).argmax(2)


def propagated(kept: Tensor, labels: Tensor, index: Tensor, fresh: Tensor, share: float) -> Tensor:
    """Tensor[B, N, C] with the fresh value of each cluster's token, and all tokens moved to their cluster's by `share`.

    index: LongTensor[B, K], the token of each cluster. fresh: Tensor[B, K, C].
    """
    kept = kept.scatter(1, index[..., None].expand(-1, -1, kept.shape[2]), fresh)
    return torch.lerp(kept, rows(fresh, labels), share)


class Kept:
    """What a module gave in the last full step, and how much more a step than in the one before."""

    def __init__(self, value: Tensor, step: int, before: Kept | None, differs: bool) -> None:
        self.value, self.step = value, step
        self.difference = (value - before.value) / (step - before.step) if before is not None and differs else None

    def forecast(self, step: int) -> Tensor:
        return self.value if self.difference is None else self.value + self.difference * (step - self.step)


class ClusCa:
    """On one transformer, until `hooks.remove`. clusters: of image tokens. every: steps from one full to the next."""

    def __init__(self, transformer: Any, every: int, *, clusters: int = 16, share: float = 0.005) -> None:
        self.hooks, self.every, self.clusters, self.share = Hooks(), every, clusters, share
        self.kept: dict[Any, Kept] = {}
        self.labels: Tensor | None = None
        self.means: Tensor | None = None
        self.generator = torch.Generator()
        self.steps = Steps(transformer, self.hooks, self._begin)
        blocks = list(transformer.transformer_blocks)
        for block in blocks:
            for name in FORECAST:
                if (module := getattr(block, name, None)) is not None:
                    replace_forward(self.hooks, module, partial(self._forecast, module))
            replace_forward(self.hooks, block.ff, partial(self._one_a_cluster, block.ff))
        self.hooks.post_forward(blocks[-1], self._cluster)

    def _begin(self) -> None:
        self.kept.clear()
        self.labels = self.means = None
        # The device's own numbers would differ from run to run.
        self.generator.manual_seed(0)

    @property
    def is_full(self) -> bool:
        return self.steps.number < FULL_AT_FIRST or (self.steps.number - FULL_AT_FIRST + 1) % self.every == 0

    def _keep(self, key: Any, value: Tensor) -> None:
        step = self.steps.number
        self.kept[key] = Kept(value, step, self.kept.get(key), differs=step > FULL_AT_FIRST - 2)

    def _forecast(
        self, module: nn.Module, original: Callable[..., Any], tokens: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if not self.is_full:
            parts = [self.kept[key] for number in range(2) if (key := (module, number)) in self.kept]
            values = tuple(part.forecast(self.steps.number) for part in parts)
            return values if len(values) > 1 else values[0]
        out = original(tokens, *args, **kwargs)
        for number, part in enumerate(out if isinstance(out, tuple) else (out,)):
            self._keep((module, number), part)
        return out

    def _one_a_cluster(self, module: nn.Module, original: Callable[..., Tensor], tokens: Tensor) -> Tensor:
        if self.is_full:
            out = original(tokens)
            self._keep(module, out)
            return out
        assert self.labels is not None
        kept, index = self.kept[module], drawn(self.labels, self.clusters, self.generator)
        kept.value = propagated(kept.value, self.labels, index, original(rows(tokens, index)), self.share)
        return kept.forecast(self.steps.number)

    def _cluster(self, block: nn.Module, args: tuple, output: Any) -> None:
        if not self.is_full:
            return
        tokens = (output[1] if isinstance(output, tuple) else output).float()
        if self.means is None:
            first = torch.randint(tokens.shape[1], (len(tokens), self.clusters), generator=self.generator)
            self.means = rows(tokens, first.to(tokens.device))
        self.labels, self.means = k_means(tokens, self.means)
