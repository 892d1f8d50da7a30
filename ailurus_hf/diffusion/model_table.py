"""Tables of diffusers' transformers, UNets and ControlNets, supported and refused, for docs/supported-models.md."""

from __future__ import annotations

from .declaration import DiffusionNetwork
from .declarations import DECLARATIONS
from .flops import joint_block_flops
from .refused import LISTS, REFUSED
from .token_order import TokenOrder


def supported_networks() -> str:
    """The declared networks as a Markdown table, and what is refused with its reason."""
    rows = ["| supported | blocks that are reduced | text in attention |", "| --- | --- | --- |"]
    for declared in sorted(DECLARATIONS, key=lambda declared: declared.network.__name__):
        rows.append(f"| `{declared.network.__name__}` | {_blocks(declared)} | {_text(declared)} |")
    rows.append(f"| {_code(LISTS)} | each of its ControlNets by itself | |")
    rows += ["", "| refused | why |", "| --- | --- |"]
    reasons: dict[str, list[str]] = {}
    for name, reason in REFUSED.items():
        reasons.setdefault(reason, []).append(name)
    rows += [f"| {_code(names)} | {reason} |" for reason, names in reasons.items()]
    return "\n".join(rows)


def _code(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def _blocks(declared: DiffusionNetwork) -> str:
    if declared.layout == "maps":
        return "in each stack between convolutions"
    return ", ".join(f"`{path}`" for path in declared.blocks)


def _text(declared: DiffusionNetwork) -> str:
    order = declared.token_order
    if not isinstance(order, TokenOrder):
        return "around the image, padded"
    if declared.flops is not joint_block_flops:
        return "apart"
    return "before the image" if order.text_first else "after the image"
