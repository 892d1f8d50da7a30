"""The `ailurus-hf` command: see what token reduction does to your model on your images, without writing code.

Each command is a file with `add_arguments(parser)` and `run(args)`, and an entry in COMMANDS. A command's file is
imported when the command is called, and torch and transformers when it runs, so that `ailurus-hf --help` answers at
once.

Exit codes: 0 all done; 1 some inputs failed, each named on stderr, and the others are done; 2 the call was wrong, told
in one line.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from importlib import import_module
from types import FrameType
from typing import NamedTuple, NoReturn

from .. import __version__
from ..errors import AiluRusError
from .launchers import LaunchError, launched

MAX_ERROR_LENGTH = 500
INTERRUPTED, TERMINATED, BROKEN_PIPE = 130, 143, 141  # 128 and the signal's number, as shells have it


class Command(NamedTuple):
    """A command: the file that holds it, the line that --help shows, and the extra that it needs."""

    module: str
    help: str
    extra: str = "vision"


COMMANDS = {
    "segment": Command("segment", "semantic segmentation of images, reduced or compared with plain"),
    "classify": Command("classify", "classify images"),
    "depth": Command("depth", "depth maps of images, 16-bit and in color"),
    "detect": Command("detect", "objects in images, as boxes drawn and in COCO's format"),
    "benchmark": Command("benchmark", "speed and fidelity of several settings on your model and images"),
    "tune": Command("tune", "find the fastest setting within a loss, for your model and images"),
    "visualize": Command("visualize", "draw which tokens are merged and what is left of the image"),
    "status": Command("status", "what is reduced where in a model, and what it saves"),
    "video": Command("video", "text to video along a clip's motion (ControlVideo), reduced or compared", "video"),
    "app": Command("app", "a page in the browser: an image or a clip, plain beside reduced, with sliders", "app"),
    "doctor": Command("doctor", "versions, extras, devices, attention kernels, and a self-check"),
    "export": Command("export", "a model as one file for ONNX Runtime, OpenVINO or torch, and a check of it"),
    "completion": Command("completion", "a script for your shell that completes commands and options"),
    "convert-segmenter": Command(
        "convert_segmenter", "convert an official Segmenter checkpoint (variant.yml beside it) to a model folder"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        The exit code, see above; 130, 141 and 143 after an interrupt, a closed pipe and a SIGTERM.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = build_parser(argv[:1])
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        near = get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        parser.error(f"no command {argv[0]!r}: {hint}")
    args = parser.parse_args(argv)
    try:
        with _terminated_by_exception():
            code: int = args.run(args)
            sys.stdout.flush()
            return code
    except AiluRusError as error:
        return _tell(args.command, str(error), getattr(error, "exit_code", 2))
    except ImportError as error:
        if (error.name or "").startswith(__package__.partition(".")[0]):  # a fault of our own
            raise
        return _tell(args.command, f'{error}: pip install "ailurus-hf[{COMMANDS[args.command].extra}]"', 2)
    except KeyboardInterrupt:
        return INTERRUPTED
    except _TerminatedError:
        return TERMINATED
    except BrokenPipeError:  # the reader has seen enough (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
        return BROKEN_PIPE
    except OSError as error:  # a path that the system refuses: too long a name, no right
        return _tell(args.command, f"{error.strerror or error}: {error.filename or ''}", 2)


def build_parser(commands: Iterable[str] = COMMANDS) -> argparse.ArgumentParser:
    """The parser of all commands; only those of `commands` have their arguments, which takes importing their files."""
    parser = _Parser(prog="ailurus-hf", description="AiluRus token reduction for Hugging Face vision transformers.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.help)
        if name in commands:
            module = import_module(f"{__name__}.{command.module}")
            module.add_arguments(subparser)
            if examples := getattr(module, "EXAMPLES", None):
                subparser.formatter_class = argparse.RawDescriptionHelpFormatter
                subparser.epilog = f"examples:{examples}"
            subparser.set_defaults(run=module.run)
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")  # one line, no usage before it


class _TerminatedError(BaseException):
    """SIGTERM, raised so that half-written files are removed on the way out."""


@contextmanager
def _terminated_by_exception() -> Iterator[None]:
    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        raise _TerminatedError

    try:
        previous = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not the main thread: whoever runs it has the signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _tell(command: str, message: str, code: int) -> int:
    message = " ".join(message.split())
    if len(message) > MAX_ERROR_LENGTH:  # a wrong checkpoint names hundreds of weights
        message = f"{message[:MAX_ERROR_LENGTH]} …"
    with suppress(LaunchError):
        if (place := launched()).rank:
            message = f"{place}: {message}"
    sys.stderr.write(f"ailurus-hf {command}: error: {message}\n")
    return code
