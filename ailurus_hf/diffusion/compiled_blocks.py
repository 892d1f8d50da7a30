"""Networks whose blocks are compiled one by one: what AiluRus does between them runs eagerly, in graph breaks.

Where the whole network is compiled, its hooks are traced with it. A block that is compiled alone would be traced with
the state of one forward, and its graph used in others.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from .forward_state import Forwards

Method = TypeVar("Method", bound=Callable[..., Any])

REASON = (
    "AiluRus needs breaks in the graphs of blocks that are compiled one by one: compile without fullgraph=True, or the "
    "network as a whole"
)
_HAS_REASON = "reason" in inspect.signature(torch.compiler.disable).parameters


def eager_in_compiled_blocks(method: Method) -> Method:
    """A method of an object with `forwards` that is traced only where the forward itself is."""
    eager = torch.compiler.disable(method, **({"reason": REASON} if _HAS_REASON else {}))

    @functools.wraps(method)
    def run(self: Any, *args: Any) -> Any:
        if torch.compiler.is_compiling() and not _is_traced(self.forwards):
            return eager(self, *args)
        return method(self, *args)

    return run  # type: ignore[return-value]


def _is_traced(forwards: Forwards) -> bool:
    forward = forwards.current
    return forward is not None and forward.traced
