"""The errors that this package raises: ValueErrors that name the wrong value and the right ones."""


class AiluRusError(ValueError):
    """The base of every error for bad input to this package.

    Example:
        >>> try:
        ...     AiluRusConfig(keep_ratio=1.5)
        ... except AiluRusError as error:
        ...     print(error)
        keep_ratio must be above 0 and at most 1, got 1.5
    """


class UnsupportedModelError(AiluRusError):
    """Nothing in the target can be reduced; the message names its class and what would work.

    Example:
        >>> try:
        ...     apply_ailurus(torch.nn.Linear(2, 2), keep_ratio=0.5)
        ... except UnsupportedModelError:
        ...     print("no layers with tokens")
        no layers with tokens
    """
