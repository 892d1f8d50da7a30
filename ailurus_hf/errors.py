"""The errors that this package raises: ValueErrors that name the wrong value and the right ones."""


class AiluRusError(ValueError):
    """The base of every error for bad input to this package."""


class UnsupportedModelError(AiluRusError):
    """Nothing in the target can be reduced; the message names its class and what would work."""
