"""Makes the paper's tables and figures, and what is measured beside them, as paper_tables.toml lists them.

    python -m benchmarks.tables --list                       # everything, and what is missing here for the rest
    python -m benchmarks.tables                              # makes what the data and weights here allow
    python -m benchmarks.tables --only "Tab. 7" "Fig. 7"     # by name
    python -m benchmarks.tables --minutes 60                 # leaves out what takes longer

Data: the folder AILURUS_DATA, with camvid/, ade20k/, cityscapes/, pascal_context/, cifar10/, imagenet/ and bccd/ in it
as far as they are there. Weights beside the shipped Segmenter: the folder AILURUS_WEIGHTS, with the names of the list;
`ailurus-hf convert-segmenter` makes them from the official checkpoints, examples/train_classifier.py makes
classifier-cifar10 and examples/train_detector.py detector-bccd. Results go to benchmarks/results as JSON, and plots to
the folder figures/ beside them. Minutes are estimates for two CPU cores (for what needs a GPU, none is given).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .harness import ROOT, device_folder

LIST = Path(__file__).with_name("paper_tables.toml")


@dataclass(frozen=True)
class Entry:
    """One command of the list, with {data}, {weights} and {gpu} still in it.

    names: the tables and figures that it makes. run: a module, or a script's path. minutes: about, on two cores; None:
    not said. needs: files and folders, or "gpu".
    """

    names: tuple[str, ...]
    what: str
    run: str
    arguments: tuple[str, ...] = ()
    options: dict[str, list[str]] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    minutes: float | None = None

    @property
    def title(self) -> str:
        """The names, each kind said once: "Tab. 1, 2, Fig. 7"."""
        parts, kind = [], ""
        for name in self.names:
            now, _, number = name.rpartition(" ")
            parts.append(number if now and now == kind else name)
            kind = now
        return ", ".join(parts)

    @property
    def module(self) -> str | None:
        return None if self.run.endswith(".py") else self.run

    def words(self, folders: dict[str, str]) -> list[str]:
        """The command's words after `python`."""
        words = ["-m", self.run] if self.module else [self.run]
        words += self.arguments
        for name, values in self.options.items():
            words += [f"--{name}", *values]
        return [word.format(**folders) for word in words]

    def missing(self, folders: dict[str, str]) -> list[str]:
        """What is not here."""
        absent = [need for need in self.needs if need != "gpu" and not (ROOT / need.format(**folders)).exists()]
        if "gpu" in self.needs and not torch.cuda.is_available():
            absent.append("gpu")
        if self.module is not None and importlib.util.find_spec(self.module) is None:
            absent.append(self.module)
        return absent


def read_list(path: Path = LIST) -> list[Entry]:
    """Every command of the list, in its order."""
    found = _load(path)
    entries = []
    for table in found["tables"]:
        shared = found["commands"].get(table.get("command"), {})
        options = {**shared.get("options", {}), **table.get("options", {})}
        for item in table.get("each", [{}]):
            own = {key: item[key] for key in ("run", "minutes") if key in item}
            merged = {**shared, **table, **own, "options": {**options, **item.get("options", {})}}
            entries.append(_entry(merged, {**found["words"], **found["lists"], **item}))
    return entries


def _load(path: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10, where pytest brings the same as tomli
        import tomli as tomllib
    return tomllib.loads(path.read_text(encoding="utf-8"))


def _entry(table: dict[str, Any], known: dict[str, Any]) -> Entry:
    return Entry(
        names=tuple(_texts(table["for"], known)),
        what=_text(table["what"], known),
        run=_text(table["run"], known),
        arguments=tuple(_texts(table.get("arguments", []), known)),
        options={name: _texts(value, known) for name, value in table["options"].items()},
        needs=tuple(_texts(table.get("needs", []), known)),
        minutes=table.get("minutes"),
    )


def _texts(value: Any, known: dict[str, Any]) -> list[str]:
    """A value as words: those of a list, also of one that {name} alone stands for; none for a flag."""
    if value is True:
        return []
    if isinstance(value, list):
        return [text for each in value for text in _texts(each, known)]
    alone = re.fullmatch(r"\{(\w+)\}", str(value))
    if alone and alone[1] in known:
        return _texts(known[alone[1]], known)
    return [_text(value, known)]


def _text(value: Any, known: dict[str, Any]) -> str:
    """With every known {name} filled in; {data}, {weights} and {gpu} stay."""
    before, after = "", str(value)
    while before != after:
        before, after = after, re.sub(r"\{(\w+)\}", lambda found: str(known.get(found[1], found[0])), after)
    return after


ENTRIES = read_list()


def chosen(only: list[str], minutes: float | None) -> list[Entry]:
    """The entries of those names that take no longer."""
    return [
        entry
        for entry in ENTRIES
        if (not only or any(name in entry.names for name in only))
        and (minutes is None or (entry.minutes is not None and entry.minutes <= minutes))
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="only say what there is and what is missing")
    parser.add_argument("--only", nargs="+", default=[], help='names, such as "Tab. 7"')
    parser.add_argument("--minutes", type=float, help="leave out what takes longer")
    args = parser.parse_args()
    given = {"data": os.environ.get("AILURUS_DATA"), "weights": os.environ.get("AILURUS_WEIGHTS")}
    folders = {name: str(Path(path).absolute()) if path else f"AILURUS_{name.upper()}" for name, path in given.items()}
    folders["gpu"] = device_folder(torch.cuda.get_device_name()) if torch.cuda.is_available() else "GPU"
    failed = []
    for entry in chosen(args.only, args.minutes):
        title = f"{entry.title}: {entry.what}"
        if missing := entry.missing(folders):
            print(f"-- {title}: needs {', '.join(need.format(**folders) for need in missing)}")
            continue
        words = entry.words(folders)
        print(f"== {title} ({entry.minutes or '?'} min)\n   python {shlex.join(words)}", flush=True)
        if args.list:
            continue
        started = time.monotonic()
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment)
        print(f"   {(time.monotonic() - started) / 60:.1f} min", flush=True)
        if done.returncode != 0:
            failed.append(title)
    for title in failed:
        print(f"failed: {title}")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
