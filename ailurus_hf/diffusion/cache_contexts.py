"""The cache context that a pipeline of diffusers calls a network in: "cond" or "uncond" where it guides by two calls.

diffusers hands it to its own caches alone, so it is noted where the network is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from ..per_thread import PerThread


class CacheContexts:
    """The name of the context that each thread is in."""

    def __init__(self) -> None:
        self._names: PerThread[str] = PerThread()

    @property
    def current(self) -> str | None:
        """This thread's, None outside of any."""
        return self._names.get()

    @contextmanager
    def entered(
        self, original: Callable[..., AbstractContextManager], name: str, *args: Any, **fields: Any
    ) -> Iterator[None]:
        """In place of a network's `cache_context(name, ...)`, which is `original`."""
        self._names.set(name)
        try:
            with original(name, *args, **fields):
                yield
        finally:
            self._names.pop()
