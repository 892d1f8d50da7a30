"""Libraries of an extra, imported where they are used, so that a missing one is named in one clear error."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import AiluRusError


def require(module: str, extra: str = "video") -> Any:
    """The module; AiluRusError with the command that installs it where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise AiluRusError(f'{module} cannot be imported ({error}): pip install "ailurus-hf[{extra}]"') from error
