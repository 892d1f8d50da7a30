"""One image through the plain and the reduced model, in turn: outputs, times, tokens; and the table of such images."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..apply import ailurus_enabled, ailurus_status
from .timing import interleaved, wait_for

if TYPE_CHECKING:
    from .loading import LoadedModel


@dataclass
class Pair:
    """plain, reduced: the model's outputs; plain_ms, reduced_ms: medians; tokens: N and M."""

    plain: Any
    reduced: Any
    plain_ms: float
    reduced_ms: float
    tokens: tuple[int, int]

    def titles(self) -> tuple[str, str]:
        """Of pictures of both: times and the speed-up."""
        fast = f"{self.plain_ms / self.reduced_ms:.2f}x as fast"
        return f"AiluRus off: {self.plain_ms:.0f} ms", f"AiluRus on: {self.reduced_ms:.0f} ms, {fast}"

    def to_dict(self, agreement: float, **scores: float | None) -> dict[str, Any]:
        """The numbers for JSON.

        Args:
            agreement: how equal the two predictions are, 0 to 1.
            scores: of each against ground truth, such as plain_ap and reduced_ap; None where there is none.
        """
        return {
            "tokens": list(self.tokens),
            "plain_ms": round(self.plain_ms, 3),
            "reduced_ms": round(self.reduced_ms, 3),
            "speedup": round(self.plain_ms / self.reduced_ms, 3),
            "agreement": round(agreement, 5),
            **{name: None if score is None else round(score, 5) for name, score in scores.items()},
        }


def run_pair(loaded: LoadedModel, inputs: dict[str, Any], repeats: int) -> Pair:
    """Times plain and reduced forwards in turn, and keeps the last outputs of each."""
    configs = {"plain": None, "reduced": loaded.ailurus}
    outputs: dict[str, Any] = {}
    tokens: dict[str, tuple[int, int]] = {}

    def contender(name: str) -> Callable[[int], None]:
        return lambda _: outputs.update({name: loaded(inputs)})

    @contextmanager
    def around(name: str) -> Iterator[None]:
        outputs.pop(name, None)  # or two outputs of one kind would be there at once
        with ailurus_enabled(loaded.model, configs[name]):
            yield
            tokens[name] = tokens_of(loaded)

    names = {name: contender(name) for name in configs}
    seconds = interleaved(names, repeats, warmup=1, device=loaded.device, around=around)
    milliseconds = {name: 1e3 * taken for name, taken in seconds.items()}
    return Pair(outputs["plain"], outputs["reduced"], milliseconds["plain"], milliseconds["reduced"], tokens["reduced"])


def run_once(loaded: LoadedModel, inputs: dict[str, Any]) -> Pair:
    """One plain and one reduced forward, as for each frame of a clip: times of single runs, not warmed up."""
    plain, plain_ms = timed(loaded, inputs)
    with ailurus_enabled(loaded.model, loaded.ailurus):
        reduced, reduced_ms = timed(loaded, inputs)
        return Pair(plain, reduced, plain_ms, reduced_ms, tokens_of(loaded))


def timed(loaded: LoadedModel, inputs: dict[str, Any]) -> tuple[Any, float]:
    """The model's outputs, and the milliseconds until they were there."""
    wait_for(loaded.device)
    start = time.perf_counter()
    outputs = loaded(inputs)
    wait_for(loaded.device)
    return outputs, 1e3 * (time.perf_counter() - start)


def tokens_of(loaded: LoadedModel) -> tuple[int, int]:
    """N at the first location of the last forward, and M after the last one; 0 and 0 where nothing is on."""
    locations = ailurus_status(loaded.model).locations
    if not locations or locations[0].num_tokens is None:
        return 0, 0
    last = [row for row in locations if row.where == locations[0].where][-1]
    return locations[0].num_tokens, last.num_clusters or 0


def summarize_pairs(results: Sequence[dict[str, Any]], **scores: float | None) -> dict[str, Any]:
    """All images as one: medians of the times, mean agreement, and the scores, rounded."""
    plain = statistics.median(result["plain_ms"] for result in results)
    reduced = statistics.median(result["reduced_ms"] for result in results)
    return {
        "plain_ms": round(plain, 3),
        "reduced_ms": round(reduced, 3),
        "speedup": round(plain / reduced, 3),
        "agreement": round(statistics.fmean(result["agreement"] for result in results), 5),
        **{name: None if score is None else round(score, 5) for name, score in scores.items()},
    }


class PairTable:
    """The table of the command line, a line at a time, so that it can be printed while images are done.

    Args:
        names: of the images, as wide as whose longest the first column is.
        metric: what is scored against ground truth; None: nothing is.
        form: of the metric's numbers.
    """

    def __init__(self, names: Sequence[str], metric: str | None = None, form: str = "{:.2%}") -> None:
        self.form, self.key = form, metric and metric.lower()
        self.heads = ["off ms", "on ms", "speed-up", "agreement"]
        self.heads += [f"off {metric}", f"on {metric}"] if metric else []
        self.first = max(map(len, [*names, "image"]))
        self.widths = [max(len(head), 9) for head in self.heads]

    def header(self) -> str:
        return self._line("image", self.heads)

    def row(self, name: str, result: dict[str, Any]) -> str:
        """The line of one image, or of all: of `Pair.to_dict` or `summarize_pairs`."""
        cells = [f"{result['plain_ms']:.1f}", f"{result['reduced_ms']:.1f}", f"{result['speedup']:.2f}x"]
        cells.append(f"{result['agreement']:.2%}")
        if self.key:
            scores = [result[f"{kind}_{self.key}"] for kind in ("plain", "reduced")]
            cells += ["-" if score is None else self.form.format(score) for score in scores]
        return self._line(name, cells)

    def _line(self, name: str, cells: Sequence[str]) -> str:
        return "  ".join([name.ljust(self.first), *(c.rjust(w) for c, w in zip(cells, self.widths, strict=True))])
