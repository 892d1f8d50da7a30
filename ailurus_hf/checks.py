"""Checks of settings and features; each error names the value that was wrong and the ones that would be right."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Optional, Union, get_args, get_origin, get_type_hints

from .errors import AiluRusError

if TYPE_CHECKING:
    from torch import Tensor


def check_features(features: Tensor, check_finite: bool) -> None:
    """Raises unless features are Tensor[B, N, C] of a float type; check_finite: and free of NaN and infinity."""
    if features.ndim != 3 or not features.is_floating_point() or features.shape[1] < 1 or features.shape[2] < 1:
        raise AiluRusError(
            f"features must be a float tensor of shape (B, N, C), got {tuple(features.shape)} of {features.dtype}"
        )
    if check_finite and not features.isfinite().all():
        wrong = int((~features.isfinite()).any(-1).sum())
        raise AiluRusError(f"features of {wrong} of {features.shape[0] * features.shape[1]} tokens are not finite")


def check_num_clusters(num_clusters: int, num_tokens: int) -> None:
    """Raises unless 1 <= M <= N."""
    if not 1 <= num_clusters <= num_tokens:
        raise AiluRusError(f"num_clusters must be between 1 and the {num_tokens} tokens, got {num_clusters}")


def check_density_peaks(num_spatial_neighbors: int, alpha: float, num_density_neighbors: int) -> None:
    """Raises unless λ >= 0, α is in [0, 1] and k >= 1."""
    if num_spatial_neighbors < 0:
        raise AiluRusError(f"num_spatial_neighbors must be 0 (no spatial term) or more, got {num_spatial_neighbors}")
    if not 0 <= alpha <= 1:
        raise AiluRusError(f"alpha must be between 0 and 1, got {alpha}")
    if num_density_neighbors < 1:
        raise AiluRusError(f"num_density_neighbors must be at least 1, got {num_density_neighbors}")


def check_at_least(least: int, **settings: int) -> None:
    """Raises unless every setting is at least this."""
    for name, value in settings.items():
        if value < least:
            raise AiluRusError(f"{name} must be at least {least}, got {value}")


def check_ratios(name: str, ratios: Iterable[float]) -> None:
    """Raises unless every ratio is in (0, 1]."""
    for ratio in ratios:
        if not 0 < ratio <= 1:
            raise AiluRusError(f"{name} must be above 0 and at most 1, got {ratio}")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raises unless the value is one of the strings."""
    if not isinstance(value, str) or value not in (choices := tuple(choices)):
        raise AiluRusError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_fields(settings: Any) -> None:
    """Gives each field of a frozen dataclass its annotated type, where that changes no value.

    `10.0`, `np.int64(10)` and `torch.tensor(10)` are the whole number 10, a list is a tuple, a mapping of fields is a
    dataclass. Numbers are finite, and True is not a number.

    Raises:
        AiluRusError: a field has another type; the message names the field, its value and what it may be.
    """
    for name, kind in _kinds(settings.__class__).items():
        object.__setattr__(settings, name, exact(name, getattr(settings, name), kind))


def exact(name: str, value: Any, kind: Any) -> Any:
    """The value in the type `kind`, an annotation; raises AiluRusError where it has none there. See `check_fields`."""
    try:
        return _converted(value, kind)
    except _DoesNotFitError:
        raise AiluRusError(f"{name} must be {_described(kind)}, got {value!r}") from None


class _DoesNotFitError(Exception):
    pass


@lru_cache(maxsize=64)
def _kinds(kind: Any) -> dict[str, Any]:
    try:
        # Python 3.10 takes no InitVar for a type; a field is none.
        hints = get_type_hints(kind, localns={"InitVar": Optional})
    except NameError:  # a type that is known inside a function alone
        hints = {}
    return {field.name: hints.get(field.name, Any) for field in dataclasses.fields(kind)}


def _converted(value: Any, kind: Any) -> Any:
    if kind is Any:
        return value
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _dataclass(value, kind)
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _first_fitting(value, inner)
    if origin is tuple:
        values = value.tolist() if getattr(value, "ndim", 0) == 1 else value
        return tuple(_converted(each, inner[0]) for each in _instance(values, (list, tuple)))
    if origin is Mapping:
        items = _instance(value, Mapping).items()
        # JSON knows no whole numbers as keys.
        keys = (int(key) if isinstance(key, str) and key.isdecimal() else key for key, _ in items)
        return {_converted(key, inner[0]): _converted(of, inner[1]) for key, (_, of) in zip(keys, items, strict=True)}
    if origin is Literal:
        if not isinstance(value, str) or value not in inner:
            raise _DoesNotFitError
        return str(value)
    if kind in (int, float, bool):
        return _number(value, kind)
    # Callable[...] is a type to Python 3.10, and nothing is an instance of it.
    return _instance(value, kind) if isinstance(kind, type) and origin is None else value


def _first_fitting(value: Any, kinds: tuple[Any, ...]) -> Any:
    for kind in kinds:
        try:
            return _converted(value, kind)
        except _DoesNotFitError:
            continue
    raise _DoesNotFitError


def _number(value: Any, kind: type) -> Any:
    """A plain number from one of Python's, numpy's or torch's; a whole one where an int is wanted."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        try:
            value = value.item()
        except RuntimeError:  # a tensor without values ("meta")
            raise _DoesNotFitError from None
    if kind is bool or isinstance(value, bool):
        if kind is bool and isinstance(value, bool):
            return value
        raise _DoesNotFitError
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _DoesNotFitError
    if kind is float:
        return value
    if value != int(value):
        raise _DoesNotFitError
    return int(value)


def _dataclass(value: Any, kind: Any) -> Any:
    if not isinstance(value, Mapping):
        return _instance(value, kind)
    known = [field.name for field in dataclasses.fields(kind)]
    unknown = sorted(str(name) for name in value if name not in known)
    if unknown:
        raise AiluRusError(f"{kind.__name__} has no fields {unknown}; it has {', '.join(known)}")
    return kind(**value)


def _instance(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise _DoesNotFitError
    return value


def _described(kind: Any, plural: bool = False) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(_described(each, plural) for each in inner)
    if origin is tuple:
        return f"a tuple of {_described(inner[0], plural=True)}"
    if origin is Mapping:
        return f"a mapping from {_described(inner[0], plural=True)} to {_described(inner[1], plural=True)}"
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    singular = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a string"}
    several = {int: "whole numbers", float: "finite numbers"}
    if kind is NoneType:
        return "None"
    return (several if plural else singular).get(kind) or f"of type {getattr(kind, '__name__', kind)}"
