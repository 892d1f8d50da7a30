"""Optional libraries: a missing one is named together with the extra of this package that installs it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import AiluRusError


class MissingExtraError(AiluRusError, ImportError):
    """A library of an extra is not installed. The message ends in the pip command that installs it."""


@contextmanager
def needs_extra(extra: str, user: str) -> Iterator[None]:
    """Around imports: what fails to import because a library is missing raises MissingExtraError instead.

    Args:
        extra: the extra of this package, as in pyproject.toml.
        user: what needs it, for the message, such as a module's name.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == __package__:  # a fault of our own
            raise
        raise MissingExtraError(f'{user} needs {missing}: pip install "ailurus-hf[{extra}]"') from error


def require(module: str, extra: str) -> Any:
    """The module. Raises MissingExtraError where it cannot be imported."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(f'{module} cannot be imported ({error}): pip install "ailurus-hf[{extra}]"') from error
