"""PerThread: what one forward keeps between its hooks, for each thread of its own."""

from __future__ import annotations

import threading
import weakref
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class _Slot(Generic[T]):
    """Where one thread's value lies. It dies with the thread."""

    def __init__(self) -> None:
        self.value: T | None = None


class _Slots(threading.local, Generic[T]):
    def __init__(self, every: weakref.WeakSet[_Slot[T]]) -> None:
        self.mine: _Slot[T] = _Slot()
        every.add(self.mine)


class PerThread(Generic[T]):
    """One value a thread, None where there is none: several threads may run one model at once.

    A copy or a pickle is empty, because what a forward keeps belongs to that forward. torch.compile reads a
    thread-local attribute, but does not see itself write one; it does see what is written inside the slot that lies
    there.
    """

    def __init__(self) -> None:
        self._every: weakref.WeakSet[_Slot[T]] = weakref.WeakSet()
        self._slots: _Slots[T] = _Slots(self._every)

    def get(self) -> T | None:
        return self._slots.mine.value

    def set(self, value: T) -> None:
        self._slots.mine.value = value

    def pop(self) -> T | None:
        """The value, which is gone from here then."""
        slot = self._slots.mine
        value, slot.value = slot.value, None
        return value

    def is_busy_elsewhere(self) -> bool:
        """Whether another thread has a value, and so is in the middle of a forward."""
        return any(slot.value is not None and slot is not self._slots.mine for slot in list(self._every))

    def __deepcopy__(self, memo: dict[int, Any]) -> PerThread[T]:
        return PerThread()

    def __reduce__(self) -> tuple[type[PerThread[T]], tuple[()]]:
        return PerThread, ()
