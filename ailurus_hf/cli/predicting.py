"""Images through a model, alone or several at once, each result finished and told as it comes; and what it took."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AiluRusError
from ..images import Image
from .batch import Batch, Show
from .telling import progress

if TYPE_CHECKING:
    from ..evaluation.loading import LoadedModel

# From an image, its path and the model's outputs for it, to its entry in the results.
Finish = Callable[[Path, Image.Image, Any], dict[str, Any]]


@dataclass
class Taken:
    """What a run took: milliseconds of the model for each image, and tokens N and M of the last one."""

    ms: list[float] = field(default_factory=list)
    tokens: tuple[int, int] = (0, 0)

    def to_dict(self) -> dict[str, Any] | None:
        """For JSON; None where no image ran."""
        if not self.ms:
            return None
        return {"ms": round(statistics.median(self.ms), 3), "tokens": list(self.tokens) if any(self.tokens) else None}

    def line(self) -> str:
        """In words: the number of images, the time of one, tokens."""
        images = f"{len(self.ms)} image{'s' * (len(self.ms) != 1)}"
        tokens = f", {self.tokens[0]} → {self.tokens[1]} tokens" if any(self.tokens) else ""
        return f"{images}, {statistics.median(self.ms):.1f} ms of the model an image{tokens}"


def predict(batch: Batch, loaded: LoadedModel, finish: Finish, show: Show, size: int = 1) -> Taken:
    """Runs the images of a batch through the model and finishes each.

    Args:
        finish: from an image and its outputs to the entry of the results.
        show: from that entry to the line that is printed.
        size: images that run at once, where they are of one size after processing.

    Raises:
        WritingError, FailedImageError: as `Batch.run`.
    """
    taken = Taken()
    batch.show = show

    def one(path: Path, image: Image.Image, outputs: Any) -> None:
        batch.attempt(path, lambda _: finish(path, image, outputs))

    def forward(inputs: dict[str, Any], count: int) -> Any:
        from ..evaluation.paired import timed, tokens_of

        outputs, ms = timed(loaded, inputs)
        taken.ms += [ms / count] * count
        taken.tokens = tokens_of(loaded)
        return outputs

    with batch.told():
        for group in _groups(batch, loaded, size):
            try:
                outputs = _split(forward(_joined([inputs for *_, inputs in group]), len(group)), len(group))
            except Exception as error:  # several at once: each alone says which it was
                if len(group) == 1:
                    batch.fail_with(group[0][0], error)
                    continue
                for path, image, inputs in group:
                    try:
                        one(path, image, forward(inputs, 1))
                    except Exception as alone:
                        batch.fail_with(path, alone)
                continue
            for (path, image, _), found in zip(group, outputs, strict=True):
                one(path, image, found)
    return taken


def run(
    batch: Batch, loaded: LoadedModel, finish: Finish, show: Show, size: int = 1, closing: str | None = None
) -> int:
    """`predict`, and the end of a command: what it took, what to think of it, the exit code.

    Args:
        closing: a line where results are, for people.
    """
    from ..evaluation.verdict import verdict

    own = predict(batch, loaded, finish, show, size)
    shares = batch.gather(asdict(own))
    if shares is None:
        return 0
    taken = Taken([ms for share in shares for ms in share["ms"]], max(tuple(share["tokens"]) for share in shares))
    if closing is not None:
        batch.say(closing)
    if taken.ms:
        batch.advise([taken.line(), *verdict(taken.tokens[0])])
    return batch.finish(loaded, images=batch.results, took=taken.to_dict())


_Prepared = tuple[Path, Image.Image, dict[str, Any]]


def _groups(batch: Batch, loaded: LoadedModel, size: int) -> Iterator[list[_Prepared]]:
    """Images in order, with their inputs; up to `size` in a row whose inputs have one shape together."""
    group: list[_Prepared] = []
    shape = None
    for path in progress(batch.images):
        try:
            image = batch.read(path)
            inputs = loaded.prepare(image)
        except Exception as error:
            batch.fail_with(path, error)
            continue
        alone = "patch_offsets" in inputs or getattr(loaded.processor, "window_size", None) is not None
        new = None if alone else {name: tuple(value.shape) for name, value in inputs.items()}
        if group and (len(group) == size or new is None or new != shape):
            yield group
            group = []
        group.append((path, image, inputs))
        shape = new
    if group:
        yield group


def _joined(inputs: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    if len(inputs) == 1:
        return inputs[0]
    return {name: torch.cat([each[name] for each in inputs]) for name in inputs[0]}


def _split(outputs: Any, count: int) -> list[Any]:
    """The outputs of each image of a batch, in the outputs' own class."""
    if count == 1:
        return [outputs]
    fields = outputs.items() if hasattr(outputs, "items") else outputs._asdict().items()
    whole = {name: value for name, value in fields if hasattr(value, "shape") and len(value.shape) > 0}
    if wrong := [name for name, value in whole.items() if value.shape[0] != count]:
        raise AiluRusError(f"the model's {wrong[0]} does not have one entry an image")
    return [type(outputs)(**{name: value[i : i + 1] for name, value in whole.items()}) for i in range(count)]
