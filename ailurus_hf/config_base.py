"""What both configs share: checks of fields, conversion to dicts and JSON files, and the format's version."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from .checks import check_choice, check_fields, exact
from .choices import clustering_names
from .errors import AiluRusError

# 1: as saved by 0.1, without a version; density peaks' settings were fields of the configs.
FORMAT_VERSION = 2
# Fields of version 1 that belong to DensityPeaks now, and what they were by default.
DENSITY_PEAKS_FIELDS: dict[str, Any] = {"alpha": 0.9, "num_spatial_neighbors": 50, "num_density_neighbors": 1}

Self = TypeVar("Self", bound="Config")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of the configs. A subclass has fields with types, and checks in `_check` what types cannot say.

    Args:
        format_version: the version of `to_dict`'s format, so that the constructor takes what `to_dict` gives; not a
            field.
    """

    format_version: InitVar[int] = FORMAT_VERSION

    def __new__(cls, *args: Any, **fields: Any) -> Any:
        refuse_moved_fields(fields)
        return super().__new__(cls)

    def __post_init__(self, format_version: int) -> None:
        if format_version != FORMAT_VERSION:
            raise AiluRusError(
                f"{type(self).__name__} takes fields of format {FORMAT_VERSION}, got {format_version!r}: use from_dict"
            )
        check_fields(self)
        self._check()

    def _check(self) -> None:
        """Raises AiluRusError where values are out of range or do not go together."""

    @classmethod
    def _migrated(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Fields of format 1 as those of format 2."""
        given = {name: fields.pop(name) for name in DENSITY_PEAKS_FIELDS if name in fields}
        if not given or given == {name: DENSITY_PEAKS_FIELDS[name] for name in given}:
            return fields
        if fields.get("clustering") == "density_peaks":
            return {**fields, "clustering": {"name": "density_peaks", **given}}
        warnings.warn(f"ignoring {given}: only the clustering 'density_peaks' has these settings", stacklevel=4)
        return fields

    def to_dict(self) -> dict[str, Any]:
        """The fields and the format's version as a dict that JSON can hold; what `from_dict` reads."""
        fields = {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {"format_version": FORMAT_VERSION, **fields}

    @classmethod
    def from_dict(cls: type[Self], fields: Mapping[str, Any]) -> Self:
        """The config of a dict, also of one that 0.1 saved.

        Args:
            fields: what `to_dict` gave. Unknown fields, as a later version may have, are ignored with a warning.

        Raises:
            AiluRusError: a value is wrong.
        """
        fields = dict(fields)
        # Fields that a person wrote have no version either; what is moved then has names that are no longer used.
        version = exact("format_version", fields.pop("format_version", 1), int)
        if version < FORMAT_VERSION:
            fields = cls._migrated(fields)
        elif version > FORMAT_VERSION:
            warnings.warn(
                f"{cls.__name__} of format {version} is newer than this version's {FORMAT_VERSION}", stacklevel=2
            )
        unknown = sorted(set(fields) - set(field_names(cls)))
        if unknown:
            warnings.warn(f"ignoring unknown {cls.__name__} fields {unknown}", stacklevel=2)
        return cls(**{name: value for name, value in fields.items() if name not in unknown})

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls: type[Self], text: str) -> Self:
        """The config of what `to_json` gave, or of a result of `autotune`; raises AiluRusError on another text."""
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise AiluRusError(f"{cls.__name__} cannot be read: no JSON: {error}") from error
        if not isinstance(fields, dict):
            raise AiluRusError(f"{cls.__name__} must be a JSON object, got {type(fields).__name__}")
        return cls.from_dict(cls.chosen(fields))

    @classmethod
    def chosen(cls, found: dict[str, Any]) -> dict[str, Any]:
        """The fields in what a file holds: a result of `autotune` has them under "config", and their class as "kind".

        Raises:
            AiluRusError: they are of another class.
        """
        kind = found.get("kind", cls.__name__)
        if kind != cls.__name__:
            raise AiluRusError(f"this result of autotune is a {kind}, and no {cls.__name__}")
        fields: dict[str, Any] = found.get("config", found)
        return fields

    def save(self, path: str | Path) -> None:
        """Writes `to_json` to a file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls: type[Self], path: str | Path) -> Self:
        """The config of a file that `save` wrote, or `autotune(...).save`."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))

    @classmethod
    def _of_preset(
        cls: type[Self], presets: Mapping[str, Mapping[str, Any]], name: str, overrides: Mapping[str, Any]
    ) -> Self:
        if name not in presets:
            raise AiluRusError(f"preset must be one of {', '.join(map(repr, presets))}, got {name!r}")
        fields: Self = from_fields(cls, {**without_replaced(presets[name], overrides), **overrides})
        return fields


def read_config(kind: type[Self], path: str | Path) -> Self:
    """`kind.load` of a file that a user named; raises AiluRusError where it cannot be read."""
    try:
        return kind.load(path)
    except OSError as error:
        raise AiluRusError(f"settings {path} cannot be read: {error.strerror or error}") from error


def field_names(kind: type[Any]) -> list[str]:
    """The names of a dataclass's fields."""
    return [field.name for field in dataclasses.fields(kind)]


def from_fields(kind: type[Any], fields: Mapping[str, Any]) -> Any:
    """A config of fields that a user gave; raises AiluRusError, naming all fields, where one is not known."""
    try:
        return kind(**fields)
    except TypeError as error:
        raise AiluRusError(f"{error}; the fields are {', '.join(field_names(kind))}") from None


def rounded_share(ratio: float, num_tokens: int) -> int:
    """round(ratio * N), halves up, within [1, N]."""
    return min(max(math.floor(ratio * num_tokens + 0.5), 1), num_tokens)


def check_clustering(config: Any) -> None:
    """A name stays a name, so that a config needs no torch; a mapping becomes the `Clustering` that it describes."""
    if isinstance(config.clustering, str):
        check_choice("clustering", config.clustering, clustering_names())
    else:
        get_clustering = import_module(".clustering", __package__).get_clustering
        object.__setattr__(config, "clustering", get_clustering(config.clustering))


def without_replaced(fields: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without what the given ones exclude: num_clusters replaces keep_ratio, and the other way round."""
    either = {"num_clusters", "keep_ratio"}
    replaced = either - given.keys() if either & given.keys() else set()
    return {name: value for name, value in fields.items() if name not in replaced}


def refuse_moved_fields(fields: Mapping[str, Any]) -> None:
    """Raises where fields are given as 0.1 had them: settings of density peaks, and mappings of scope and reduce."""
    moved = [f"{name}={fields[name]!r}" for name in DENSITY_PEAKS_FIELDS if name in fields]
    if moved:
        settings = ", ".join(moved)
        raise AiluRusError(
            f"{settings}: settings of density peaks are given with the clustering, "
            f"clustering=DensityPeaks({settings}) of ailurus_hf.clustering"
        )
    for name in ("scope", "reduce"):
        if isinstance(of_levels := fields.get(name), Mapping):
            levels = ", ".join(f"{level}: Level({name}={value!r})" for level, value in of_levels.items())
            raise AiluRusError(f"{name} must be one for all, got {dict(of_levels)!r}: use levels={{{levels}}}")


def _plain(value: Any) -> Any:
    """A field's value as JSON has it; tuples stay tuples."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(of) for key, of in value.items()}
    return value
