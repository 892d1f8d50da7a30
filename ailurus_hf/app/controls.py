"""What the page's controls say: a preset and what was changed of it, as an AiluRusConfig and as Python."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from ..apply import ailurus_enabled
from ..config import AiluRusConfig
from ..errors import AiluRusError, UnsupportedModelError
from ..presets import VISION_PRESETS
from ..vision.discovery import find_encoders

if TYPE_CHECKING:
    from ..evaluation.loading import LoadedModel

SAVED = "saved with the model"
# The paper keeps 400 of 1600 tokens; as a share it is a setting of every image size.
PAPER_KEEPS = 0.25
# Of one stage of a model in stages.
MOST_LAYERS = 64


class Controls(NamedTuple):
    """What a person has set: a preset, and the values of the controls, which start as the preset's."""

    preset: str
    keep_ratio: float
    location: int
    clustering: str
    restore: str


@dataclasses.dataclass(frozen=True)
class Preset:
    """Settings by name.

    Args:
        name: of `AiluRusConfig.preset`, or SAVED.
        config: the settings. Several locations are shown as the first one, with what is kept at the end.
    """

    name: str
    config: AiluRusConfig

    def controls(self) -> Controls:
        """The values that the controls start with."""
        config, keep = self.config, self.config.keep_ratio
        kept = keep[-1] if isinstance(keep, tuple) else PAPER_KEEPS if keep is None else keep
        return Controls(self.name, kept, config.locations[0], _name_of(config), str(config.restore))

    def changes(self, controls: Controls) -> dict[str, Any]:
        """The fields that the controls change; of several locations all, as the controls know one."""
        config, start = self.config, self.controls()
        changed: dict[str, Any] = {}
        steps = len(config.locations) > 1 and (controls.keep_ratio, controls.location) != start[1:3]
        if steps or controls.location != start.location:
            changed["cluster_location"] = controls.location
        if steps or controls.keep_ratio != start.keep_ratio or config.keep_ratio is None:
            changed["keep_ratio"] = controls.keep_ratio
        if controls.clustering != start.clustering:
            changed["clustering"] = controls.clustering
        if controls.restore != start.restore:
            changed["restore"] = controls.restore
            if controls.restore == "residual" and config.restore_at == "decoder":
                changed["restore_at"] = "backbone"
        return changed

    def config_of(self, controls: Controls) -> AiluRusConfig:
        """The settings. Raises AiluRusError where they do not go together."""
        changed = self.changes(controls)
        if "keep_ratio" in changed:
            changed["num_clusters"] = None
        return dataclasses.replace(self.config, **changed)

    def expression(self, controls: Controls) -> str:
        """The settings as Python."""
        if self.name != SAVED:
            changed = "".join(f", {name}={value!r}" for name, value in self.changes(controls).items())
            return f'AiluRusConfig.preset("{self.name}"{changed})'
        plain = AiluRusConfig(keep_ratio=0.5).to_dict()
        fields = {name: value for name, value in self.config_of(controls).to_dict().items() if value != plain[name]}
        fields = {"keep_ratio": 0.5, **fields} if not {"keep_ratio", "num_clusters"} & set(fields) else fields
        given = ", ".join(f"{name}={_as_tuple(value)!r}" for name, value in fields.items() if value is not None)
        return f"AiluRusConfig({given})"


def presets_for(loaded: LoadedModel) -> dict[str, Preset]:
    """The presets by name, the one to start with first: settings saved with the model, else what suits its task."""
    named = {name: Preset(name, AiluRusConfig.preset(name)) for name in VISION_PRESETS}  # type: ignore[arg-type]
    start = "classification" if loaded.task == "classify" else "dense"
    found = {start: named[start], **named}
    if saved := getattr(loaded.model.config, "ailurus_config", None):
        found = {SAVED: Preset(SAVED, AiluRusConfig.from_dict(saved)), **found}
    return found


def last_location(model: Any) -> int:
    """The last layer after which the model can be reduced. Raises UnsupportedModelError where it cannot be at all."""
    try:
        return min(len(found.layers) for found in find_encoders(model)) - 1
    except UnsupportedModelError:
        for location in reversed(range(MOST_LAYERS)):  # stages or windows, whose layers count otherwise
            with suppress(AiluRusError), ailurus_enabled(model, cluster_location=location, keep_ratio=0.5):
                return location
        raise


def _name_of(config: AiluRusConfig) -> str:
    clustering = config.clustering
    return clustering if isinstance(clustering, str) else str(config.to_dict()["clustering"]["name"])


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
