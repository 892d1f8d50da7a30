"""Docstrings as mkdocstrings reads them: parameters that share a line get one each, and examples are code."""

from __future__ import annotations

import inspect
import re
from textwrap import indent
from typing import Any

import griffe

SHARED = re.compile(r"^( {4,})(\w+(?:, \w+)+): (.*(?:\n\1 +.*)*)", re.MULTILINE)
EXAMPLE = re.compile(r"^Example:\n((?: {4}.*\n?|\n)+)", re.MULTILINE)


def one_each(text: str) -> str:
    """`key, value: TEXT` as `key: TEXT` and `value: TEXT`."""

    def lines(match: re.Match[str]) -> str:
        return "\n".join(f"{match[1]}{name}: {match[3]}" for name in match[2].split(", "))

    return SHARED.sub(lines, text)


def fenced(text: str) -> str:
    """The code of an example in a fence."""

    def fence(match: re.Match[str]) -> str:
        code = inspect.cleandoc(match[1])
        language = "pycon" if code.startswith(">>>") else "python"
        return "Example:\n" + indent(f"```{language}\n{code}\n```\n", "    ")

    return EXAMPLE.sub(fence, text)


class Readable(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(one_each(inspect.cleandoc(obj.docstring.value)))
