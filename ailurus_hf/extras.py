"""Optional libraries: a missing one is named together with the extra of this package that installs it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import AiluRusError
from .versions import VersionError, torchvision_advice


class MissingExtraError(AiluRusError, ImportError):
    """A library of an extra is not installed. The message ends in the pip command that installs it."""


@contextmanager
def needs_extra(extra: str, user: str) -> Iterator[None]:
    """Around imports: what fails to import because a library is missing raises MissingExtraError instead.

    A torchvision that does not fit torch, which fails anywhere in the libraries that import it, raises VersionError.

    Args:
        extra: the extra of this package, as in pyproject.toml.
        user: what needs it, for the message, such as a module's name.
    """
    try:
        yield
    except (ImportError, RuntimeError) as error:
        if isinstance(error, AiluRusError):
            raise
        missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if missing == __package__:  # a fault of our own
            raise
        if missing:
            raise MissingExtraError(f'{user} needs {missing}: pip install "ailurus-hf[{extra}]"') from error
        # transformers says "could not import module", and has the reason as the cause.
        reasons = [reason for reason in _chain(error) if "torchvision" in str(reason)]
        if not reasons:
            raise
        raise VersionError(f"{user}: {torchvision_advice(reasons[-1])}") from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what caused it, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def require(module: str, extra: str) -> Any:
    """The module. Raises MissingExtraError where it cannot be imported."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(f'{module} cannot be imported ({error}): pip install "ailurus-hf[{extra}]"') from error
