"""tomesd (Bolya and Hoffman 2023, arXiv 2303.17604), the authors' package, on networks and off without a trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn


def merged_by_tomesd(networks: Sequence[nn.Module], **settings: Any) -> Callable[[], None]:
    """Patches UNets and ControlNets; settings as of `tomesd.apply_patch`. Returns the call that undoes it."""
    import tomesd  # what else a benchmark runs does without

    for network in networks:
        tomesd.apply_patch(network, **settings)

    def off() -> None:
        for network in networks:
            tomesd.remove_patch(network)
            for module in network.modules():
                vars(module).pop("_tome_info", None)

    return off
