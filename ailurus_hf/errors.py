"""The errors this package raises: all are ValueErrors that name the wrong number and the right one."""


class AiluRusError(ValueError):
    """Base of every error raised for bad input to this package."""


class UnsupportedModelError(AiluRusError):
    """The target has no place where tokens can be reduced; the message names its class and what would work."""
