"""Speed and fidelity of several settings on one's own model and images: what `ailurus-hf benchmark` measures.

Plain and all settings take turns on the same image; each is taken off before the next one's turn. Beside each speed-up
stand the one that the FLOPs allow, the share of it that was reached, and how near the output stays to the plain one.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from ..apply import ailurus_enabled, ailurus_status
from ..choices import clustering_names
from ..config import AiluRusConfig
from ..errors import AiluRusError
from ..images import read_image
from . import counted_flops
from .timing import interleaved, markdown

if TYPE_CHECKING:
    from .loading import LoadedModel
    from .scoring import Scorer

PAPER: dict[str, Any] = {"clustering": "density_peaks", "restore": "copy"}
COLUMNS = {
    "method": "method",
    "location": "location",
    "keep": "keep|{:g}",
    "tokens": "tokens",
    "ms": "ms|{:.1f}",
    "speed_up": "speed-up|{:.2f}×",
    "ideal": "ideal|{:.2f}×",
    "share": "share|{:.2f}",
    "agreement": "agreement|{:.2%}",
    "cosine": "cosine|{:.4f}",
    "score": "score|{:.2%}",
}


@dataclass(frozen=True)
class Row:
    """One setting. tokens: patches and representatives of the last image; ms: median of a forward.

    ideal: speed-up by FLOPs alone; share: of it. agreement: share of equal labels (pixels, or images), None without
    labels;
    cosine: mean over pixels, images or tokens of that between plain and reduced outputs. score: against labels, None
    where there are none.
    """

    method: str
    location: int | None
    keep: float | None
    tokens: str | None
    ms: float
    speed_up: float
    ideal: float
    share: float
    agreement: float | None
    cosine: float
    score: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Rounded, for JSON."""
        return {name: round(v, 5) if isinstance(v, float) else v for name, v in asdict(self).items()}


@dataclass(frozen=True)
class Setting:
    """A method (see `method_fields`) after layer `location`, with `keep` of the tokens."""

    method: str
    location: int
    keep: float

    def config(self) -> AiluRusConfig:
        """Raises AiluRusError on what is out of range."""
        return AiluRusConfig(cluster_location=self.location, keep_ratio=self.keep, **method_fields(self.method))


@dataclass
class _Fidelity:
    """Sums over images."""

    agreement: list[float] = field(default_factory=list)
    cosine: list[float] = field(default_factory=list)
    full: float = 0.0
    reduced: float = 0.0
    tokens: str | None = None


def method_fields(method: str) -> dict[str, Any]:
    """Fields of AiluRusConfig for a method's name.

    It is "paper", or the name of a registered clustering with "-" for "_", which restores the residual, or with
    "-smooth" or "-copy" after it: "local-kmeans-smooth".

    Raises:
        AiluRusError: no clustering has that name.
    """
    if method == "paper":
        return PAPER
    clusterings = {name.replace("_", "-"): name for name in clustering_names()}
    for restore in ("residual", "smooth", "copy"):
        clustering = clusterings.get(method.removesuffix(f"-{restore}"))
        if clustering is not None:
            return {"clustering": clustering, "restore": restore}
    raise AiluRusError(
        f"no method {method!r}: there are paper, {', '.join(clusterings)}, and the latter with -smooth or -copy"
    )


def settings(methods: Iterable[str], locations: Iterable[int], keeps: Iterable[float]) -> dict[Setting, AiluRusConfig]:
    """Every combination with its config; raises AiluRusError on what is out of range."""
    every = [Setting(*each) for each in itertools.product(methods, locations, keeps)]
    return {setting: setting.config() for setting in every}


def benchmark(
    loaded: LoadedModel,
    images: Sequence[Path],
    configs: dict[Setting, AiluRusConfig],
    repeats: int,
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
    scorer: Scorer | None = None,
) -> list[Row]:
    """Measures plain and every config on the images; `repeats` timed rounds, each on another image.

    scorer: of the outputs against labels.

    Raises AiluRusError where the model cannot be reduced so, before the first image is read.
    """
    for config in configs.values():
        with ailurus_enabled(loaded.model, config):
            pass
    fidelity = {setting: _Fidelity() for setting in configs}
    flops: dict[Any, int] = {}
    # The first pass also makes what depends on an image's size alone, so that no timed round has to.
    for path in progress(images):
        image = read_image(path)
        score = partial(scorer.add, path=path, image=image) if scorer is not None else None
        _compare(loaded, loaded.prepare(image), configs, fidelity, flops, score)

    # Prepared before, because only forwards are timed; more than one a round are never seen.
    inputs = [_inputs(loaded, path) for path in images[:repeats]]
    seconds = interleaved(
        {setting: lambda turn: loaded(inputs[turn % len(inputs)]) for setting in (None, *configs)},
        repeats,
        warmup=0,
        device=loaded.device,
        around=lambda setting: ailurus_enabled(loaded.model, None if setting is None else configs[setting]),
        progress=progress,
    )
    plain, *reduced = (1e3 * taken for taken in seconds.values())
    rows = [
        Row("plain", None, None, None, plain, 1.0, 1.0, 1.0, None, 1.0, None if scorer is None else scorer.score(None))
    ]
    for setting, ms in zip(configs, reduced, strict=True):
        seen = fidelity[setting]
        ideal = seen.full / seen.reduced
        rows.append(
            Row(
                method=setting.method,
                location=setting.location,
                keep=setting.keep,
                tokens=seen.tokens,
                ms=ms,
                speed_up=plain / ms,
                ideal=ideal,
                share=plain / ms / ideal,
                agreement=statistics.fmean(seen.agreement) if seen.agreement else None,
                cosine=statistics.fmean(seen.cosine),
                score=None if scorer is None else scorer.score(setting),
            )
        )
    return rows


def _inputs(loaded: LoadedModel, path: Path) -> dict[str, Tensor]:
    return loaded.prepare(read_image(path))


def _compare(
    loaded: LoadedModel,
    inputs: dict[str, Tensor],
    configs: dict[Setting, AiluRusConfig],
    fidelity: dict[Setting, _Fidelity],
    flops: dict[Any, int],
    score: Callable[..., Any] | None,
) -> None:
    """Adds one image to every config's fidelity."""
    outputs = loaded(inputs)
    if score is not None:
        score(None, outputs=outputs)
    plain, has_labels = _prediction(outputs)
    seen = loaded.one_sequence(inputs)
    shape = tuple(seen["pixel_values"].shape)
    if shape not in flops:
        flops[shape] = counted_flops(loaded.model, seen)
    for setting, config in configs.items():
        with ailurus_enabled(loaded.model, config):
            outputs = loaded(inputs)
            if score is not None:
                score(setting, outputs=outputs)
            reduced, _ = _prediction(outputs)
            status = ailurus_status(loaded.model)
        found = fidelity[setting]
        found.full += flops[shape]
        found.reduced += flops[shape] - status.saved_flops
        found.tokens = f"{status.locations[0].num_tokens} → {status.locations[0].num_clusters}"
        found.cosine.append(F.cosine_similarity(plain, reduced, dim=-1).mean().item())
        if has_labels:
            found.agreement.append((plain.argmax(-1) == reduced.argmax(-1)).float().mean().item())


def _prediction(outputs: Any) -> tuple[Tensor, bool]:
    """What a model is for, its values last, and whether they are scores of classes."""
    logits = getattr(outputs, "logits", None)
    depth = getattr(outputs, "predicted_depth", None)
    if depth is not None:
        return depth.float().flatten(1), False
    masks = getattr(outputs, "masks_queries_logits", None)
    if masks is not None:  # each query's class, as EoMT and its like have them
        return outputs.class_queries_logits.float(), True
    if logits is None and getattr(outputs, "last_hidden_state", None) is None:
        raise AiluRusError(f"{type(outputs).__name__} holds neither logits nor hidden states to compare")
    if logits is None:
        return outputs.last_hidden_state.float(), False
    return (logits.movedim(1, -1) if logits.ndim == 4 else logits).float(), True


def as_markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    scored = any(row.score is not None for row in rows)
    columns = {name: heading for name, heading in COLUMNS.items() if scored or name != "score"}
    return markdown([asdict(row) for row in rows], columns)
