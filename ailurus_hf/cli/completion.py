"""`ailurus-hf completion`: a script for your shell that completes commands, options and their choices."""

from __future__ import annotations

import argparse

from ..extras import require

EXAMPLES = """
  ailurus-hf completion bash > ~/.local/share/bash-completion/completions/ailurus-hf
  ailurus-hf completion zsh > ~/.zfunc/_ailurus-hf
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"))


def run(args: argparse.Namespace) -> int:
    from . import build_parser

    print(require("shtab", "vision").complete(build_parser(), args.shell))
    return 0
