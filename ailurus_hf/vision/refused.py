"""What is refused and why, and the table of all that is supported."""

from __future__ import annotations

from .families import FAMILIES, Family

_PYRAMID = (
    "it halves its grid from stage to stage and shifts or pools windows on it, so its tokens never leave the grid"
)
_OWN_ATTENTION = (
    "its layers hand neither a mask nor a bias to their attention, so a representative cannot count for its tokens"
)

# By the start of the module's name, so that every class of a family is found.
REFUSED = {
    "sam2": _PYRAMID,
    "swin": _PYRAMID,
    "swinv2": _PYRAMID,
    "maskformer.modeling_maskformer_swin": _PYRAMID,
    "hiera": _PYRAMID,
    "pvt": _PYRAMID,
    "pvt_v2": _PYRAMID,
    "internvl": _OWN_ATTENTION,
    "timm_backbone": "it reads timm's layers on the whole grid: load a ViT of timm with AutoModel, or in transformers' format",
}


def supported_models() -> str:
    """The declared families as a Markdown table, and what is refused with its reason."""
    rows = ["| family | encoder in transformers | also in | tokens around the patches |", "| --- | --- | --- | --- |"]
    for family in FAMILIES:
        rows.append(
            f"| {family.name} | `{family.encoder.rsplit('.', 1)[1]}` | {family.models or '–'} | {_around(family)} |"
        )
    rows.append("| SegFormer | `SegformerModel` | SegFormer's heads | none; stage by stage: segformer.py |")
    rows.append(
        "| VitDet, SAM, SAM-HQ | `VitDetModel`, `SamVisionModel` | VitMatte, SamModel | none; global layers only: windowed.py |"
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
        parts.append("detection tokens behind")
    if family.layout:
        parts.append("padding behind")
    if family.queries:
        parts.append("queries join late")
    return ", ".join(parts)
