"""RebuildableProcessor: an attention processor whose class makes another one with the same settings.

diffusers rebuilds processors by their class, `type(processor)()`, when an IP-Adapter is loaded or unloaded and when a
motion UNet is made. Settings that were arguments would be lost, so each processor has a class of its own that holds
them.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

Processor = TypeVar("Processor", bound="RebuildableProcessor")


class _OneForEach(type):
    """A class that was made for one processor equals the class as written."""

    def __eq__(cls, other: object) -> bool:
        return (getattr(cls, "_written", None) or cls) is (getattr(other, "_written", None) or other)

    def __hash__(cls) -> int:
        return hash(id(getattr(cls, "_written", None) or cls))


class RebuildableProcessor(metaclass=_OneForEach):
    """`type(processor)()` equals `processor`: its class keeps the arguments that it was made with."""

    # Of the classes that are made for one processor: the class as written, and the arguments.
    _written: ClassVar[type | None] = None
    _made_with: ClassVar[tuple[tuple, dict[str, Any]]] = ((), {})

    def __new__(cls: type[Processor], *args: Any, **kwargs: Any) -> Processor:
        if cls._written is not None:
            return object.__new__(cls)
        return object.__new__(_bound(cls, args, kwargs))

    def __reduce__(self) -> tuple:
        args, kwargs = self._made_with
        # The arguments travel as state, so that those that lead back here find the processor already made.
        return _unmade, (self._written,), (args, kwargs, vars(self))

    def __setstate__(self, state: tuple[tuple, dict[str, Any], dict[str, Any]]) -> None:
        args, kwargs, attributes = state
        type(self)._made_with = args, kwargs
        vars(self).update(attributes)


def _bound(written: type[Processor], args: tuple, kwargs: dict[str, Any]) -> type[Processor]:
    """A subclass that takes these arguments where it is called without any."""

    def initialize(self: Any, *given: Any, **named: Any) -> None:
        if not given and not named:
            given, named = type(self)._made_with
        written.__init__(self, *given, **named)

    fields: dict[str, Any] = {
        "__init__": initialize,
        "__module__": written.__module__,
        "__qualname__": written.__qualname__,
    }
    fields |= {"_written": written, "_made_with": (args, kwargs)}
    make: Any = type(written)
    bound: type[Processor] = make(written.__name__, (written,), fields)
    return bound


def _unmade(written: type[Processor]) -> Processor:
    return object.__new__(_bound(written, (), {}))
