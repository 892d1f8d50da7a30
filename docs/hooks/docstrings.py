"""Docstrings as mkdocstrings reads them: parameters that share one line get a line each, with the same text."""

from __future__ import annotations

import re
from typing import Any

import griffe

SHARED = re.compile(r"^( {4,})(\w+(?:, \w+)+): (.*(?:\n\1 +.*)*)", re.MULTILINE)


def one_each(text: str) -> str:
    """`key, value: TEXT` as `key: TEXT` and `value: TEXT`."""

    def lines(match: re.Match[str]) -> str:
        return "\n".join(f"{match[1]}{name}: {match[3]}" for name in match[2].split(", "))

    return SHARED.sub(lines, text)


class OneEach(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = one_each(obj.docstring.value)
