"""Every code block of the README and of docs/ runs, or a title above it says why not; and the site holds all pages.

Python blocks of a document run in order in one namespace. A text block right after one is what it prints. Commands of
ailurus-hf run; of others it is checked that what they name is there. Tiny models stand in for those of the Hub, and
images have two denoising steps instead of 20.
"""

import ast
import contextlib
import importlib.util
import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import torchvision_ops
from documents import DOCUMENTS, FENCE, NOT_RUN, PAGES, ROOT, Block, blocks, prepare, save_stand_ins, with_stand_ins

from ailurus_hf.choices import CLUSTERING_CLASSES
from ailurus_hf.cli import main

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

WITH_BLOCKS = [
    document for document in DOCUMENTS if any(block.language in ("python", "bash") for block in blocks(document))
]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
PACKAGES = {"onnxscript", "onnxruntime"}  # of others, that a page has the reader install


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_stand_ins(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def registries():
    """What a page registers is taken back."""
    import ailurus_hf.clustering
    import ailurus_hf.vision.families  # noqa: F401  (fills them)
    from ailurus_hf.diffusion import networks
    from ailurus_hf.vision import registry

    known = [CLUSTERING_CLASSES, registry.FAMILIES, registry.TOKEN_DECODERS, registry.READERS, networks._DECLARED]
    before = [dict(each) for each in known]
    yield
    for each, entries in zip(known, before, strict=True):
        each.clear()
        each.update(entries)


@pytest.mark.parametrize("document", WITH_BLOCKS)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # the exporters' own
def test_the_blocks_run(document, stand_ins, registries, tmp_path, monkeypatch) -> None:
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__main__"}
    printed = None
    for block in blocks(document):
        if block.title.startswith(NOT_RUN) or lacks_library(block):
            printed = None
        elif block.language == "python":
            printed = run_python(with_stand_ins(block.text, stand_ins), document, names)
        elif block.language == "bash":
            for line in block.text.replace("\\\n", " ").splitlines():
                run_command(with_stand_ins(line, stand_ins))
        elif block.language == "text" and printed is not None and not block.title:
            assert words(block.text) == words(printed), f"{document} shows what is not printed:\n{printed}"


def test_the_notebook_runs_and_shows_what_it_prints(monkeypatch) -> None:
    monkeypatch.chdir(ROOT / "examples")
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    names: dict = {}
    for cell in json.loads(Path("quickstart.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            code = "".join(cell["source"]).replace("range(5)", "range(1)").replace("[2]", "[0]")
            printed = run_python(code, "quickstart.ipynb", names)
            shown = "".join(line for out in cell["outputs"] for line in out.get("text", []))
            assert "times as fast" in shown or words(shown) == words(printed)


def run_python(code: str, document: str, names: dict) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, document, "exec"), names)
    return out.getvalue()


def words(text: str) -> list[str]:
    return text.split()


def lacks_library(block: Block) -> bool:
    if "extra detection" in block.title and block.language == "python":
        return not torchvision_ops.prepare()
    needed = {"extra datasets": "datasets", "ray[data]": "ray"}
    return any(name in block.title and not importlib.util.find_spec(module) for name, module in needed.items())


def run_command(line: str) -> None:
    """Runs a command of ailurus-hf; of another, checks that its script, target, extra or options are there."""
    program, *arguments = shlex.split(line.removeprefix("srun "), comments=True) or [""]
    if program == "ailurus-hf":
        try:
            code = main(arguments)
        except SystemExit as exit:  # argparse's own answers
            code = exit.code or 0
        assert code == 0, line
    elif program == "pip":
        named = [argument for argument in arguments if not argument.startswith("-") and argument != "install"]
        for extra in re.findall(r"\w+", "".join(re.findall(r"\[(.*?)\]", " ".join(named)))):
            assert extra in EXTRAS, line
        assert all("[" in name or name in PACKAGES for name in named), line
    elif program == "make":
        assert re.search(rf"^[\w -]*\b{arguments[0]}\b[\w -]*:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
    elif program.startswith(("python", "torchrun", "OMP_NUM_THREADS")) or program == "accelerate":
        check_script(arguments, line)
    else:
        assert not program, f"no test knows {program}: {line}"


def check_script(arguments: list[str], line: str) -> None:
    """That a script of the repository exists and knows its options."""
    if "-m" in arguments:
        assert importlib.util.find_spec(arguments[arguments.index("-m") + 1]), line
        return
    (script,) = (argument for argument in arguments if argument.endswith(".py"))
    text = (ROOT / script).read_text()
    shared = "".join((ROOT / "examples" / name).read_text() for name in ("training.py", "camvid_data.py"))
    for option in arguments[arguments.index(script) + 1 :]:
        if option.startswith("--"):
            assert f'"{option}"' in text + shared, f"{script} has no {option}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_block_is_run_or_says_why_not(document) -> None:
    text = (ROOT / document).read_text()
    fences = re.findall(r"^```(?!$)(.*)$", text, re.MULTILINE)
    assert len(fences) == len(FENCE.findall(text)), "a fence that the tests do not read"
    for block in blocks(document):
        assert block.language in {"python", "bash", "text", "bibtex"}, block.language
        if block.title.startswith(NOT_RUN):
            assert block.title.startswith(f"{NOT_RUN}: ") or "here: " in block.title, "it does not say why"
        if block.language == "python":
            ast.parse(block.text)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files(document: str) -> None:
    text = re.sub(FENCE, "", (ROOT / document).read_text())
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / document).parent.joinpath(target).exists(), target


def test_the_site_has_every_page_once() -> None:
    nav = re.sub("#.*", "", (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2])
    assert sorted(re.findall(r"[\w/-]+\.md", nav)) == sorted(page.removeprefix("docs/") for page in PAGES)


def test_the_reference_has_every_public_name() -> None:
    pages = "".join(path.read_text() for path in (ROOT / "docs/reference").glob("*.md"))
    listed = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    # A function in a module of its own name is listed with it: its short address is the module's.
    listed = [re.sub(r"\.(\w+)\.\1$", r".\1", name) for name in listed]
    modules = ("clustering", "detection", "diffusion", "evaluation", "pipelines", "segmenter", "video", "visualization")
    top = importlib.import_module("ailurus_hf").__all__
    public = {*top}
    for module in modules:
        public |= {*importlib.import_module(f"ailurus_hf.{module}").__all__}
    short = [name.rpartition(".")[2] for name in listed]
    assert public - {*short} == set()
    for name in listed:
        if name.rpartition(".")[2] in top:
            assert short.count(name.rpartition(".")[2]) == 1, f"{name} is listed twice"


def test_one_address_everywhere() -> None:
    """Of the repository, which moves with one replacement."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    assert urls["Repository"] == re.search(r"^repo_url: (\S+)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)[1]
    assert urls["Documentation"] == re.search(r"^site_url: (\S+)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)[1]
    assert f'repository-code: "{urls["Repository"]}"' in (ROOT / "CITATION.cff").read_text()
    templates = "".join(path.read_text() for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    for link in re.findall(r"https://github\.com/[\w-]+/[\w-]+", (ROOT / "README.md").read_text() + templates):
        assert link == urls["Repository"]


def test_the_pages_that_are_whole_files() -> None:
    for page in PAGES:
        for name in re.findall(r"^<!-- include: (\S+) -->$", Path(ROOT / page).read_text(), re.MULTILINE):
            assert (ROOT / name).is_file()
