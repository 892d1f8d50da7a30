"""The directions of imports, read from the sources: which part knows which, and who knows the libraries."""

import ast
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "ailurus_hf").rglob("*.py"))
OURS = [
    path
    for folder in ("ailurus_hf", "benchmarks", "examples", "pipelines", "tests")
    for path in (ROOT / folder).rglob("*.py")
]
# Each part may import those of the lines above its own, and itself. Parts of one line do not know each other.
LAYERS = [
    ("errors",),
    ("versions",),
    ("checks", "choices", "exporting", "extras", "grid_cache", "hooks", "per_thread", "precision", "profiling"),
    ("clusters", "config_base", "images", "level", "presets"),
    ("config_diffusion",),
    ("config", "status"),
    ("fields",),
    ("clustering", "segmenter", "video", "visualization"),
    ("attention",),
    ("vision", "diffusion", "language"),
    ("apply", "detection", "pipelines"),
    ("evaluation",),
    ("app",),
    ("cli",),
]
LAYER = {part: number for number, parts in enumerate(LAYERS) for part in parts}
# Folders and modules that may import the library, and those that may import from inside it.
KNOW = {
    "transformers": ("cli", "detection", "evaluation", "pipelines", "segmenter", "vision", "language"),
    "diffusers": ("cli", "diffusion", "pipelines"),
}
KNOW_INTERNALS = {
    "transformers": {
        "vision/backend.py",
        # A model and an image processor of transformers' own kind.
        "segmenter/modeling_segmenter.py",
        "segmenter/image_processing_segmenter.py",
    },
    "diffusers": {
        "diffusion/backend.py",
        "diffusion/declaration.py",
        "diffusion/declarations.py",
        "diffusion/stacks.py",
        # A pipeline of diffusers' own kind.
        "pipelines/controlvideo/pipeline.py",
    },
}


@dataclass(frozen=True)
class Import:
    """module: absolute. late: inside a function. for_types: under `if TYPE_CHECKING`, so it never runs."""

    module: str
    late: bool
    for_types: bool


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in SOURCES}


def imports_of(path: Path) -> list[Import]:
    """Every import of a file; of `from package import module`, the module."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    found: list[Import] = []

    def visit(node: ast.AST, late: bool, for_types: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend(Import(alias.name, late, for_types) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) - child.level + 1] if child.level else []
                base = ".".join([*above, *filter(None, [child.module])])
                names = [f"{base}.{alias.name}" for alias in child.names]
                found.extend(Import(name if name in MODULES else base, late, for_types) for name in names)
            elif isinstance(child, ast.Call) and ast.unparse(child.func).split(".")[-1] in ("import_module", "require"):
                # By name: `require("diffusers", …)`.
                first = child.args[0] if child.args else None
                if isinstance(first, ast.Constant) and not first.value.startswith("."):
                    found.append(Import(first.value, late, for_types))
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            visit(child, late or inside, for_types or typing)

    visit(ast.parse(path.read_text(encoding="utf-8")), False, False)
    return found


def part_of(module: str) -> str | None:
    """The first name inside the package; None for its facade, which imports what is asked for."""
    return module.split(".")[1] if module.startswith("ailurus_hf.") else None


def test_every_part_has_its_layer():
    assert {part_of(module) for module in MODULES} - {None} <= set(LAYER)


def wrong_directions(path: Path) -> list[str]:
    own, wrong = part_of(module_of(path)), []
    for found in imports_of(path):
        if found.module.split(".")[0] in ("benchmarks", "examples", "tests"):
            wrong.append(found.module)
        if found.module == "ailurus_hf":
            # The facade knows everything, so only what nothing else imports may know it.
            wrong += [] if own in LAYERS[-1] else [found.module]
        elif (other := part_of(found.module)) is not None and other != own and not found.for_types:
            wrong += [found.module] if LAYER[other] >= LAYER[own] else []
    return wrong


def test_imports_point_one_way():
    wrong = {module: wrong_directions(path) for module, path in MODULES.items() if module != "ailurus_hf"}
    assert not {module: imports for module, imports in wrong.items() if imports}


def forbidden(path: Path) -> list[str]:
    """Imports of the libraries where nobody may know them, or not so deep."""
    name, part = path.relative_to(ROOT / "ailurus_hf").as_posix(), part_of(module_of(path))
    wrong = []
    for found in imports_of(path):
        library, _, inside = found.module.partition(".")
        if library in KNOW and (part not in KNOW[library] or (inside and name not in KNOW_INTERNALS[library])):
            wrong.append(found.module)
    return wrong


def test_who_knows_the_libraries():
    wrong = {module: forbidden(path) for module, path in MODULES.items()}
    assert not {module: imports for module, imports in wrong.items() if imports}


def test_no_circles_while_importing():
    """Neither between modules nor between parts: late imports and those for types do not run then."""
    for group in (lambda module: module, part_of):
        graph: dict[str, set[str]] = {}
        for module, path in MODULES.items():
            near = {i.module for i in imports_of(path) if not i.late and not i.for_types and i.module in MODULES}
            # A package's own modules run while it is imported; its names are known by then.
            near = {other for other in near if not module.startswith(f"{other}.")}
            edges = graph.setdefault(group(module) or "ailurus_hf", set())
            edges |= {group(other) or "ailurus_hf" for other in near} - {group(module) or "ailurus_hf"}
        while leaves := [node for node, edges in graph.items() if not edges & graph.keys()]:
            for leaf in leaves:
                del graph[leaf]
        assert not graph, f"in a circle, or importing one: {graph}"


def test_files_are_short():
    long = {str(path.relative_to(ROOT)): count for path in OURS if (count := len(path.read_text().splitlines())) > 400}
    assert not long


def test_a_wrong_import_is_seen(tmp_path, monkeypatch):
    """What the functions above say of a file that breaks every rule."""
    source = """
from ..cli import main
import transformers.models.vit
def late():
    from ailurus_hf.diffusion import clock
    require("diffusers", "video")
if TYPE_CHECKING:
    from . import peaks
"""
    path = ROOT / "ailurus_hf" / "clustering" / "made.py"
    monkeypatch.setattr(Path, "read_text", lambda self, **_: source)
    assert [(i.module, i.late, i.for_types) for i in imports_of(path)] == [
        ("ailurus_hf.cli", False, False),
        ("transformers.models.vit", False, False),
        ("ailurus_hf.diffusion.clock", True, False),
        ("diffusers", True, False),
        ("ailurus_hf.clustering.peaks", False, True),
    ]
    assert wrong_directions(path) == ["ailurus_hf.cli", "ailurus_hf.diffusion.clock"]
    assert forbidden(path) == ["transformers.models.vit", "diffusers"]
