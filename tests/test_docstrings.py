"""Public names have full docstrings: Args with shapes, Returns, Raises, an Example that runs, and the source."""

import doctest
import importlib
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator

import pytest
import torch
import torchvision_ops

from ailurus_hf import diffusion
from ailurus_hf.choices import CLUSTERING_CLASSES

MODULES = (
    "",
    ".clustering",
    ".detection",
    ".diffusion",
    ".evaluation",
    ".pipelines",
    ".segmenter",
    ".video",
    ".visualization",
)
# What is published, and where: the docstring has to say so.
PUBLISHED = {
    "AiluRusConfig": "2311.01197",
    "count_weighted_attention": "Eq. 5",
    "spatial_density_peaks": "section 3.2",
    "DensityPeaks": "section 3.2",
    "TokenClusters": "section 3.2",
    "local_kmeans": "SLIC",
    "ward": "Ward",
    "kmeans": "Lloyd",
    "SegmenterConfig": "2105.05633",
    "SegmenterForSemanticSegmentation": "2105.05633",
    "ControlVideoPipeline": "2305.13077",
    "mask_rcnn": "section 4.2",
    "ViTWithFPN": "Lin et al.",
    "FlowInterpolator": "Kroeger",
    "NetworkInterpolator": "RIFE",
    "ssim": "Wang",
    "warping_error": "Lai",
    "draw_assignment": "Fig. 2",
    "reconstruct_image": "Fig. 2",
    "assignment_statistics": "figure 7",
}
SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Example|Source):$", re.MULTILINE)


def public() -> dict[str, object]:
    """Functions and classes by their first public address."""
    found: dict[str, object] = {}
    for module in MODULES:
        with torchvision_ops.in_reach() as there:
            if module == ".detection" and not there:
                continue
            home = importlib.import_module(f"ailurus_hf{module}")
            things = {name: getattr(home, name) for name in home.__all__}
        for name, thing in things.items():
            if typing.get_origin(thing) is not None:
                continue  # an alias of Callable[...], a class to Python 3.10
            if (inspect.isclass(thing) or inspect.isfunction(thing)) and thing not in found.values():
                found[f"ailurus_hf{module}.{name}"] = thing
    return found


def with_methods(names: dict[str, object]) -> Iterator[tuple[str, object]]:
    for name, thing in names.items():
        yield name, thing
        if inspect.isclass(thing):
            fields = {*getattr(thing, "__dataclass_fields__", ())}
            for method, function in vars(thing).items():
                function = getattr(function, "__func__", function)
                if inspect.isfunction(function) and not method.startswith("_") and method not in fields:
                    yield f"{name}.{method}", getattr(thing, method)


PUBLIC = public()
EVERY = dict(with_methods(PUBLIC))


def sections(thing: object) -> dict[str, str]:
    """The docstring by section; "" is what stands before the first."""
    text = inspect.cleandoc(thing.__doc__ or "")
    parts = SECTION.split(text)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def parameters(thing: object) -> dict[str, inspect.Parameter]:
    """What a user gives; of configs of transformers' kind, the fields of their own."""
    if not inspect.isclass(thing):
        signature = inspect.signature(thing)
    elif issubclass(thing, Exception) or not ({"__init__", "__annotations__"} & vars(thing).keys()) or is_auto(thing):
        return {}
    else:
        signature = inspect.signature(thing.__init__)
    own = vars(thing).get("__annotations__", {}) if hasattr(thing, "model_type") else signature.parameters
    return {n: p for n, p in signature.parameters.items() if n not in ("self", "cls") and n in own and n[0] != "_"}


def is_auto(thing: type) -> bool:
    """A class that only `from_pretrained` and `from_config` make objects of."""
    return hasattr(thing, "auto_class")


def described(text: str) -> dict[str, str]:
    """Each parameter of an Args section with its text; several may share one."""
    entries = re.split(
        r"^    (?=\*{0,2}\w+(?:, \*{0,2}\w+)*:)", textwrap.indent(textwrap.dedent(text), "    "), flags=re.MULTILINE
    )
    found = {}
    for entry in entries[1:]:
        names, _, rest = entry.partition(":")
        found |= {name.strip().lstrip("*"): rest for name in names.split(",")}
    return found


@pytest.mark.parametrize("name", EVERY)
def test_there_is_a_docstring(name: str) -> None:
    assert inspect.getdoc(EVERY[name])


@pytest.mark.parametrize("name", PUBLIC)
def test_every_argument_is_described_with_its_shape(name: str) -> None:
    thing, told = PUBLIC[name], sections(PUBLIC[name])
    given, known = parameters(thing), described(told.get("Args", ""))
    assert set(given) - set(known) - {"kwargs", "format_version"} == set(), "not under Args"
    for parameter, entry in given.items():
        if "Tensor" in str(entry.annotation) and not re.search("Callable|TokenClusters|dict", str(entry.annotation)):
            assert re.search(r"Tensor\[|not used", known[parameter]), f"{parameter} without its shape"


@pytest.mark.parametrize("name", [name for name, thing in PUBLIC.items() if inspect.isfunction(thing)])
def test_what_functions_return_and_raise_is_told(name: str) -> None:
    function, told = PUBLIC[name], sections(PUBLIC[name])
    returned = inspect.signature(function).return_annotation
    if parameters(function) and returned not in (None, "None", inspect.Signature.empty):
        assert "Returns" in told or "Yields" in told, "no Returns"
    if re.search(r"^\s+raise \w", inspect.getsource(function), re.MULTILINE):
        assert "Raises" in told, "no Raises"


@pytest.mark.parametrize("name", PUBLIC)
def test_there_is_an_example(name: str) -> None:
    assert "Example" in sections(PUBLIC[name]), "no Example"


@pytest.mark.parametrize("name", [name for name, thing in EVERY.items() if ">>>" in (thing.__doc__ or "")])
def test_examples_run(name: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {address.rpartition(".")[2]: thing for address, thing in PUBLIC.items()} | {"torch": torch}
    names |= {order: getattr(diffusion, order) for order in ("IMAGE_ONLY", "IMAGE_FIRST", "TEXT_FIRST")}
    parser = doctest.DocTestParser()
    test = parser.get_doctest(inspect.cleandoc(EVERY[name].__doc__), names, name, None, None)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    try:
        assert runner.run(test, out=report.append).failed == 0, "".join(report)
    finally:
        CLUSTERING_CLASSES.pop("one_of_all", None)  # register_clustering's


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_source_is_named(name: str) -> None:
    things = [thing for address, thing in PUBLIC.items() if address.rpartition(".")[2] == name]
    if not things:
        pytest.skip("needs torchvision")
    assert PUBLISHED[name] in str(things[0].__doc__)
