"""Caches of diffusers in blocks: `enable_cache`, `apply_first_block_cache` and the like, which skip parts of steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..config import AiluRusDiffusionConfig
from ..errors import AiluRusError


def refuse_caches(blocks: Iterable[nn.Module], because: str) -> None:
    """Raises AiluRusError where one is on in blocks, or in parts of them such as attention.

    because: why that cannot be.
    """
    for block in blocks:
        for module in (block, *block.children()):
            registry: Any = vars(module).get("_diffusers_hook")
            for name, hook in getattr(registry, "hooks", {}).items():
                if getattr(hook, "_is_stateful", False):
                    raise AiluRusError(f"the cache {name!r} of diffusers {because}")


def reason_beside_steps(config: AiluRusDiffusionConfig) -> str:
    """Why none can be on where steps build on one another."""
    if config.full_every is None:
        return (
            f"counts steps in which blocks run, not all with inner_every={config.inner_every}: switch one of them off"
        )
    return (
        "would give representatives what is of all tokens in full steps, or the other way round, with "
        f"full_every={config.full_every}: switch one of them off"
    )
