"""Without the optional libraries: what needs one ends in a line that names the extra, in a fresh interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HIDDEN = (
    "PIL",
    "transformers",
    "diffusers",
    "cv2",
    "torchvision",
    "imageio_ffmpeg",
    "tqdm",
    "huggingface_hub",
    "shtab",
    "gradio",
)
HIDE = f"""
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HIDDEN}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
"""


def run(code: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", HIDE + code], env=environment, capture_output=True, text=True)


def test_imports_name_the_extra() -> None:
    modules = {"visualization": "vision", "video": "video", "detection": "detection", "segmenter": "vision"}
    code = "import importlib\n"
    for module, extra in modules.items():
        code += f"""
try:
    importlib.import_module("ailurus_hf.{module}")
except ImportError as error:
    assert 'pip install "ailurus-hf[{extra}]"' in str(error), error
    print("{module}", str(error).count("\\n"))
"""
    done = run(code)
    assert done.stdout.split() == [word for module in modules for word in (module, "0")], done.stderr


COMMANDS = {
    "segment": ["x.jpg", "--model", "m"],
    "classify": ["x.jpg", "--model", "m"],
    "depth": ["x.jpg", "--model", "m"],
    "detect": ["x.jpg", "--model", "m"],
    "benchmark": ["x.jpg", "--model", "m"],
    "tune": ["x.jpg", "--model", "m"],
    "visualize": ["x.jpg", "--model", "m"],
    "status": ["--model", "m"],
    "export": ["--model", "m", "--output", "m.onnx"],
    "completion": ["bash"],
    "app": ["--model", "m"],
    "convert-segmenter": ["x.pth", "out"],
    "video": ["--model", "m", "--controlnet", "c", "--prompt", "p", "--video", "v.mp4", "--output", "out.mp4"],
}


def test_commands_end_in_one_line_that_names_the_extra() -> None:
    code = f"""
from ailurus_hf.cli import COMMANDS, main
given = {COMMANDS!r}
assert set(COMMANDS) == {{*given, "doctor"}}, COMMANDS
for command, arguments in given.items():
    print(command, main([command, *arguments]))
"""
    done = run(code)
    assert done.stdout.splitlines() == [f"{command} 2" for command in COMMANDS], done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(COMMANDS), done.stderr
    for command, line in zip(COMMANDS, lines, strict=True):
        extra = command if command in ("app", "video") else "vision"
        assert line.startswith(f"ailurus-hf {command}: error: "), line
        assert f'pip install "ailurus-hf[{extra}]"' in line, line


def test_help_and_doctor_need_no_extra() -> None:
    code = """
import importlib.metadata as metadata
from ailurus_hf.cli import COMMANDS, main
version = metadata.version
def installed(name):
    if name == "transformers":
        raise metadata.PackageNotFoundError(name)
    return version(name)
metadata.version = installed
for name in COMMANDS:
    try:
        main([name, "--help"])
    except SystemExit as error:
        assert error.code == 0
print(main(["doctor"]))
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "0" and "self-check not run" in done.stdout


def test_the_own_modules_of_the_package_are_not_taken_for_extras() -> None:
    from ailurus_hf.extras import MissingExtraError, needs_extra, require

    with pytest.raises(ModuleNotFoundError) as raised, needs_extra("vision", "this test"):
        import ailurus_hf.no_such_module  # noqa: F401
    assert not isinstance(raised.value, MissingExtraError)
    with pytest.raises(MissingExtraError, match=r'no_such_library.*pip install "ailurus-hf\[video\]"'):
        require("no_such_library", "video")
