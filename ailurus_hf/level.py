"""Level: what one resolution of a UNet does in its own way, a part of AiluRusDiffusionConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .checks import check_fields, check_ratios
from .choices import Reduce, Scope


@dataclass(frozen=True, kw_only=True)
class Level:
    """What one resolution of a UNet does in its own way. None: as the config says.

    Args:
        keep_ratio, scope, reduce: as in `AiluRusDiffusionConfig`.

    Raises:
        AiluRusError: a value is wrong.

    Example:
        >>> Level(scope="attention", reduce="kv").to_dict()
        {'scope': 'attention', 'reduce': 'kv'}
    """

    keep_ratio: float | None = None
    scope: Scope | None = None
    reduce: Reduce | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_ratios("keep_ratio", [] if self.keep_ratio is None else [self.keep_ratio])

    def to_dict(self) -> dict[str, Any]:
        """The fields that are not None."""
        return {name: value for name, value in vars(self).items() if value is not None}
