"""The error for what a user gave that cannot be used."""

from __future__ import annotations

from ..errors import AiluRusError


class BadInputError(AiluRusError):
    """Something the user gave cannot be used. The command line prints it as one line and exits with 2."""
