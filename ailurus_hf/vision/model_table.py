"""The table of all that is supported, and of what is refused, for docs/supported-models.md."""

from __future__ import annotations

from . import families as _families  # noqa: F401  (declares them)
from .refused import REFUSED
from .registry import FAMILIES, Family


def supported_models() -> str:
    """The declared families as a Markdown table, and what is refused with its reason."""
    rows = ["| family | encoder in transformers | also in | tokens around the patches |", "| --- | --- | --- | --- |"]
    for family in FAMILIES.values():
        rows.append(
            f"| {family.name} | `{family.key.rsplit('.', 1)[1]}` | {family.models or '–'} | {_around(family)} |"
        )
    rows.append("| SegFormer | `SegformerModel` | SegFormer's heads | none; stage by stage |")
    rows.append(
        "| VitDet, SAM, SAM-HQ | `VitDetModel`, `SamVisionModel` | VitMatte, SamModel | none; global layers only |"
    )
    rows += ["", "| refused | why |", "| --- | --- |"]
    reasons: dict[str, list[str]] = {}
    for module, reason in REFUSED.items():
        reasons.setdefault(reason, []).append(module.split(".")[0])
    rows += [f"| {', '.join(dict.fromkeys(names))} | {reason} |" for reason, names in reasons.items()]
    return "\n".join(rows)


def _around(family: Family) -> str:
    prefix = "CLS and registers" if callable(family.prefix) else str(family.prefix)
    before = prefix + (" + registers" if family.registers else "") + " before"
    parts = [before if family.prefix or family.registers else "none"]
    if family.suffix:
        parts.append("detection tokens after")
    if family.layout:
        parts.append("padding after")
    if family.queries:
        parts.append("queries join late")
    return ", ".join(parts)
