"""examples/minimal_ailurus.py: it clusters and computes what the package does, with torch alone."""

import ast
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch

from ailurus_hf import (
    AiluRusConfig,
    SegmenterForSemanticSegmentation,
    apply_ailurus,
    count_weighted_attention,
    spatial_density_peaks,
)

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
SCRIPT = ROOT / "examples/minimal_ailurus.py"
sys.path.insert(0, str(SCRIPT.parent))

import minimal_ailurus as minimal  # noqa: E402

GRIDS = [(1, 2), (1, 17), (13, 1), (3, 3), (4, 7), (9, 5), (12, 12), (17, 21), (2, 3, 4)]
SETTINGS = [{}, {"lam": 0}, {"lam": 1, "k": 3}, {"lam": 8, "alpha": 0.0}, {"lam": 24, "alpha": 1.0, "k": 5}, {"k": 4}]


def features(kind, count, seed, width=6):
    """Three pictures' tokens. Whole numbers give many equal distances, and tokens that are equal."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "random":
        return torch.randn(3, count, width, generator=generator)
    return torch.randint(-1, 2, (3, count, 2), generator=generator).float()


def assert_same_clusters(x, grid, num_clusters, lam=50, alpha=0.9, k=1):
    want = spatial_density_peaks(x, grid, num_clusters, num_spatial_neighbors=lam, alpha=alpha, num_density_neighbors=k)
    for image, assignment, centers in zip(x, want.assignment, want.centers, strict=True):
        got = minimal.spatial_density_peaks(image, grid, num_clusters, lam, alpha, k)
        assert torch.equal(got[1], centers)
        assert torch.equal(got[0], assignment)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", ["random", "ties"])
def test_clusters_equal_the_packages(grid, kind):
    count = math.prod(grid)
    for seed, given in enumerate(SETTINGS):
        for num_clusters in sorted({1, 2, max(count // 4, 1), max(count // 2, 1), count}):
            assert_same_clusters(features(kind, count, seed), grid, num_clusters, **given)


def test_clusters_equal_the_packages_by_tiles():
    """So many tokens that the package takes matrix products for distances; those of whole numbers are exact."""
    x = torch.randint(-8, 9, (2, 24 * 40, 16), generator=torch.Generator().manual_seed(0))
    assert_same_clusters(x.float(), (24, 40), 240)


def test_merging_nothing_is_the_identity():
    x = features("random", 28, 0)
    every, ones = torch.arange(28).expand(3, -1), torch.ones(3, 28)
    assert minimal.spatial_density_peaks(x[0], (4, 7), 28)[0].tolist() == list(range(28))
    assert torch.equal(minimal.merge(x, every, ones), x)
    assert torch.equal(minimal.unmerge(x, every), x)


def small_vit(**given):
    """In double precision, so that what is equal is so to the last digits; attention far from uniform."""
    torch.manual_seed(0)
    vit = minimal.ViT(**{"grid": (5, 6), "width": 32, "depth": 3, "heads": 2, "patch": 4, **given}).double().eval()
    for block in vit.layer:
        block.query.weight.data *= 4
        block.key.weight.data *= 4
    return vit


@pytest.mark.parametrize("location", [0, 1, 2])
@torch.no_grad()
def test_a_model_that_merges_nothing_is_plain(location):
    vit = small_vit()
    pictures = torch.rand(2, 3, 16, 28).double()
    plain = vit(pictures)
    assert plain.shape == (2, 28, 32)
    for num_clusters in (28, 1000):
        torch.testing.assert_close(vit(pictures, L=location, M=num_clusters), plain)
    assert (vit(pictures, L=location, M=7) - plain).abs().max() > 0.01


@pytest.mark.parametrize("location", [0, 1, 2])
@torch.no_grad()
def test_layers_after_the_location_run_on_representatives(location):
    vit, lengths = small_vit(), []
    for block in vit.layer:
        block.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    reduced = vit(torch.rand(2, 3, 16, 28).double(), L=location, M=7)
    assert lengths == [1 + 28] * location + [1 + 7] * (3 - location)
    assert reduced.shape == (2, 28, 32)
    assert [len(picture.unique(dim=0)) for picture in reduced] == [7, 7]
    with pytest.raises(AssertionError, match="L = 3 leaves none of 3 layers"):
        vit(torch.rand(1, 3, 16, 28).double(), L=3, M=7)


def test_gradients_pass_the_merge():
    vit = small_vit()
    pictures = torch.rand(2, 3, 16, 28).double().requires_grad_()
    vit(pictures, L=0, M=7).square().sum().backward()
    # Every patch is part of a representative, and the class token has not seen any yet.
    assert pictures.grad.abs().unflatten(3, (7, 4)).unflatten(2, (4, 4)).sum((1, 3, 5)).gt(0).all()


@torch.no_grad()
def test_a_token_of_count_m_weighs_as_m_equal_tokens():
    counts = torch.tensor([[1.0, 3.0, 2.0, 5.0, 1.0], [4.0, 1.0, 1.0, 1.0, 5.0]], dtype=torch.float64)
    clusters = torch.stack([torch.arange(5).repeat_interleave(c) for c in counts.long()])
    block, few = small_vit().layer[0], torch.randn(2, 5, 32).double()
    many = minimal.unmerge(few, clusters)
    torch.testing.assert_close(minimal.unmerge(block(few, counts), clusters), block(many))
    assert (minimal.unmerge(block(few), clusters) - block(many)).abs().max() > 0.01

    q, k, v = (torch.randn(2, 4, 5, 8) for _ in range(3))
    counts = counts.float()
    torch.testing.assert_close(
        minimal.count_weighted_attention(q, k, v, counts), count_weighted_attention(q, k, v, counts)
    )


def test_it_imports_torch_and_nothing_else():
    tree = ast.parse(SCRIPT.read_text())

    def imported(nodes):
        found = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = [getattr(node, "module", None) or node.names[0].name for node in found]
        return {name.split(".")[0] for name in names} - sys.stdlib_module_names

    assert imported(tree.body) == {"torch"}
    assert imported(ast.walk(tree)) == {"torch", "PIL", "safetensors"}


LINES = [
    r"N = (\d+) tokens, M = (\d+) after layer 2 of 8",
    r"plain (\d+) ms, reduced (\d+) ms: (\d+\.\d+)x",
    r"cosine between the outputs: (\d\.\d+) on average, (\d\.\d+) for the worst 5 %",
]


def numbers(lines):
    """What stands in the script's last lines; fails where a line is another."""
    found = [re.fullmatch(pattern, line) for pattern, line in zip(LINES, lines[-3:], strict=True)]
    return [[float(number) for number in match.groups()] for match in found]


@pytest.fixture(scope="module")
def on_the_street():
    """What the script prints beside its assets, and the names that it leaves."""
    with redirect_stdout(StringIO()) as printed:
        names = runpy.run_path(str(SCRIPT), run_name="__main__")
    return printed.getvalue().splitlines(), names


def test_it_runs_on_the_street(on_the_street):
    lines, _ = on_the_street
    assert len(lines) == 3
    (tokens, clusters), (plain, reduced, speedup), (mean, worst) = numbers(lines)
    assert (tokens, clusters) == (2700, 675)
    assert speedup == pytest.approx(plain / reduced, abs=0.02)
    assert 0.9 < mean < 1 and 0.7 < worst < mean


def test_it_runs_alone(tmp_path):
    """As one file in an empty folder: a made-up picture, and no package to import."""
    shutil.copy(SCRIPT, tmp_path)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, SCRIPT.name], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    first, *lines = result.stdout.splitlines()
    assert first.startswith("a made-up picture and random weights: ") and "street.jpg" in first
    (tokens, clusters), _, (mean, worst) = numbers(lines)
    assert (tokens, clusters) == (300, 75)
    assert 0 < worst < mean < 1


@torch.no_grad()
@pytest.mark.parametrize("location, num_clusters", [(None, None), (0, 36), (2, 36), (5, 100), (7, 1)])
def test_it_computes_what_the_package_computes(on_the_street, location, num_clusters):
    """The trained encoder on two parts of the street, in double precision so that both cluster the same numbers."""
    vit, picture = on_the_street[1]["vit"].double(), on_the_street[1]["picture"].double()
    pictures = torch.cat([picture[..., :144, :256], picture[..., 400:544, 500:756]])
    encoder = SegmenterForSemanticSegmentation.from_pretrained(ROOT / "examples/assets/segmenter-camvid").encoder
    encoder = encoder.double().eval()
    if location is not None:
        config = AiluRusConfig.paper(location, num_clusters)
        apply_ailurus(encoder, replace(config, restore_at="backbone"))
    want = encoder(pictures, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
    got = vit(pictures, L=location or 0, M=num_clusters)
    torch.testing.assert_close(got, want)
