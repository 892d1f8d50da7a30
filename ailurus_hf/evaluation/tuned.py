"""Tuned: what `autotune` found: a table of settings, the chosen one, and how sure the choice is."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..apply import apply_ailurus
from ..config import AiluRusConfig, AiluRusDiffusionConfig
from ..errors import AiluRusError
from .search import AnyConfig
from .timing import markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Target = TypeVar("Target")
KINDS: dict[str, type[AnyConfig]] = {kind.__name__: kind for kind in (AiluRusConfig, AiluRusDiffusionConfig)}
# Of the files that `Tuned.save` writes.
TUNED_VERSION = 1


@dataclass(frozen=True)
class TunedRow:
    """One setting, measured.

    Args:
        config: the setting.
        label: the setting in words.
        ms: median milliseconds of an input.
        speed_up: median over inputs of plain over reduced time, with `speed_low` and `speed_high` around it (95 %).
        loss: mean over inputs, with `loss_low` and `loss_high` around it (95 %).
        num_inputs: on how many inputs it was measured.
    """

    config: AnyConfig
    label: str
    ms: float
    speed_up: float
    speed_low: float
    speed_high: float
    loss: float
    loss_low: float
    loss_high: float
    num_inputs: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        numbers = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "config"}
        rounded = {name: round(v, 5) if isinstance(v, float) else v for name, v in numbers.items()}
        return {"config": self.config.to_dict(), **rounded}


@dataclass
class Tuned:
    """The result of `autotune`; prints as a table.

    Args:
        rows: settings that were measured to the end, fastest first; the plain model is not among them.
        chosen: the number of the chosen row.
        goal: what was asked for: {"speedup": …}, {"max_loss": …} or {"pareto": True}.
        reached: whether the chosen row reaches it.
        confident: whether the choice is outside of what chance does.
        note: what to know beside that, in words; "" for nothing.
        loss_means: what the losses are.
        num_tried: settings that were tried at all.
        interrupted: whether the search was broken off from the keyboard.
        measured_on: device, threads, precision, versions and date.
    """

    rows: list[TunedRow]
    chosen: int
    goal: dict[str, Any]
    reached: bool
    confident: bool
    note: str = ""
    loss_means: str = ""
    num_tried: int = 0
    interrupted: bool = False
    measured_on: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> AnyConfig:
        """The chosen setting."""
        return self.rows[self.chosen].config

    def apply(self, target: Target) -> Target:
        """`apply_ailurus` with the chosen setting."""
        return apply_ailurus(target, self.best)

    def front(self) -> list[TunedRow]:
        """The rows that no other row beats in both speed and loss, slowest first."""
        ordered = sorted(self.rows, key=lambda row: (row.loss, -row.speed_up))
        found: list[TunedRow] = []
        for row in ordered:
            if not found or row.speed_up > found[-1].speed_up:
                found.append(row)
        return found

    def table(self) -> str:
        """The rows as a Markdown table; the chosen one is marked."""
        cells = [
            {
                "chosen": "→" if number == self.chosen else "",
                "setting": row.label,
                "ms": row.ms,
                "speed": f"{row.speed_up:.2f}× ({row.speed_low:.2f} to {row.speed_high:.2f})",
                "loss": f"{row.loss:.4f} ({row.loss_low:.4f} to {row.loss_high:.4f})",
            }
            for number, row in enumerate(self.rows)
        ]
        columns = {"chosen": " ", "setting": "setting", "ms": "ms|{:.1f}", "speed": "speed-up", "loss": "loss"}
        return markdown(cells, columns)

    def __str__(self) -> str:
        goal = ", ".join(f"{name}={value}" for name, value in self.goal.items())
        lines = [f"{goal}: {self.rows[self.chosen].label}", "", self.table(), "", f"loss: {self.loss_means}"]
        return "\n".join(lines + ([self.note] if self.note else []))

    def _repr_markdown_(self) -> str:
        return str(self)

    def plot(self) -> Figure:
        """Speed-up against loss of all rows, the front as a line and the chosen row marked; a figure, not shown.

        Raises:
            AiluRusError: matplotlib or Pillow is not there.
        """
        from ..visualization import plot_front

        goal = ", ".join(f"{name}={value}" for name, value in self.goal.items())
        return plot_front(
            [row.loss for row in self.rows],
            [row.speed_up for row in self.rows],
            [self.rows.index(row) for row in self.front()],
            labels=[row.label for row in self.rows],
            chosen=self.chosen,
            loss_means=self.loss_means or "loss",
            title=f"{goal}: {self.rows[self.chosen].label}",
        )

    def to_dict(self) -> dict[str, Any]:
        """What `save` writes."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "rows"}
        rows = [row.to_dict() for row in self.rows]
        about = {"tuned_version": TUNED_VERSION, "kind": type(self.best).__name__, "config": self.best.to_dict()}
        return {**about, **fields, "rows": rows}

    def save(self, path: str | Path) -> None:
        """Writes one JSON file, which `apply_ailurus`, `from_pretrained` and `ailurus-hf --config` take."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def save_pretrained(
        self, target: Any, folder: str | Path, *, processor: Any = None, base_model: str | None = None
    ) -> None:
        """Saves a model or pipeline with the chosen setting, a model card of what was measured, and this result.

        Args:
            target: what was tuned; the setting is switched on in it.
            folder: for `save_pretrained`, `AiluRusModel….from_pretrained` and `apply_ailurus(pipe)`.
            processor: a model's processor, saved beside it; a pipeline has its own.
            base_model: what was tuned, by its name on the Hub, for the card; None: as the target was loaded.

        Example:
            tuned.save_pretrained(model, "reduced", processor=processor)
        """
        self._save_pretrained(target, Path(folder), str(folder), processor, base_model)

    def push_to_hub(
        self,
        target: Any,
        repo_id: str,
        *,
        processor: Any = None,
        base_model: str | None = None,
        private: bool | None = None,
        token: str | None = None,
    ) -> str:
        """What `save_pretrained` writes, as a repository on the Hub.

        Args:
            target, processor, base_model: as of `save_pretrained`.
            repo_id: such as "me/segmenter-reduced"; made where it is not there.
            private, token: as of `huggingface_hub.HfApi.create_repo`.

        Returns:
            The repository's address.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self._save_pretrained(target, Path(folder), address.repo_id, processor, base_model)
            api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="Tuned by ailurus_hf")
        return str(address)

    def _save_pretrained(self, target: Any, folder: Path, name: str, processor: Any, base_model: str | None) -> None:
        from .model_card import RESULT, model_card

        card = model_card(self, target, name, base_model)  # before the target knows itself by the folder
        self.apply(target).save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
        self.save(folder / RESULT)
        (folder / "README.md").write_text(card, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Tuned:
        """The result of a file that `save` wrote.

        Raises:
            AiluRusError: the file is none of these, or of a later version.
        """
        try:
            saved = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise AiluRusError(f"{path} is no JSON: {error}") from error
        if not isinstance(saved, dict) or saved.get("tuned_version") != TUNED_VERSION:
            version = saved.get("tuned_version") if isinstance(saved, dict) else None
            raise AiluRusError(f"{path} is no result of autotune of version {TUNED_VERSION}, got {version}")
        kind = KINDS[saved["kind"]]
        rows = [TunedRow(**{**row, "config": kind.from_dict(row["config"])}) for row in saved["rows"]]
        known = {f.name for f in dataclasses.fields(cls)} - {"rows"}
        return cls(rows, **{name: value for name, value in saved.items() if name in known})
