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

    def entered(
        self, original: Callable[..., AbstractContextManager], name: str, **fields: Any
    ) -> AbstractContextManager:
        """In place of a network's `cache_context(name, **fields)`, which is `original`."""
        return self._noted(original, name, fields)

    @contextmanager
    def _noted(
        self, original: Callable[..., AbstractContextManager], name: str, fields: dict[str, Any]
    ) -> Iterator[None]:
        self._names.set(name)
        try:
            with original(name, **fields):
                yield
        finally:
            self._names.pop()
