"""kernel="triton" of local k-means: torch's clusters, by Triton's interpreter; and errors where it cannot run."""

import copy
import importlib.util
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton_clusters

from ailurus_hf import AiluRusConfig, AiluRusDiffusionConfig, AiluRusError, local_kmeans
from ailurus_hf.clustering import LocalKMeans, local_kmeans_triton
from ailurus_hf.clustering.local_kmeans import grid_cells, tokens_around
from ailurus_hf.extras import MissingExtraError

ROOT = Path(__file__).parents[2]
WAYS = triton_clusters.ways(LocalKMeans())
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, a gigabyte")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the interpreter finds, in a process of its own: it would hold for every other test of this one."""
    path = tmp_path_factory.mktemp("triton") / "found.pt"
    search = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": search}
    command = [sys.executable, triton_clusters.__file__, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(path)


def same(one, clusters):
    return torch.equal(one[0], clusters.assignment) and torch.equal(one[1], clusters.counts)


@needs_triton
@pytest.mark.parametrize("name", triton_clusters.CASES)
def test_same_clusters_as_torchs_form(found, name):
    x, grid, count, rounds = triton_clusters.CASES[name]
    assert same(found[name], local_kmeans(x, grid, count, num_rounds=rounds))


@needs_triton
def test_the_cases_have_ties_and_empty_cells(found):
    x, grid, count, _ = triton_clusters.CASES["equal tokens, ties"]
    cells = grid_cells(grid, count, x.device)
    means = torch.stack([x[:, cells.start == cell].mean(1) for cell in range(count)], 1)
    scores = (means.square().sum(-1) / 2)[:, None] - x @ means.transpose(1, 2)
    scores = scores.gather(2, cells.candidates.expand(len(x), -1, -1))
    nearest = scores == scores.amin(2, keepdim=True)
    chosen = [cells.candidates[n][row].unique() for image in nearest for n, row in enumerate(image)]
    assert sum(len(cells) > 1 for cells in chosen) > 10
    # Of those that are as near, the first.
    assert torch.equal(torch.stack([cells.min() for cells in chosen]).view(2, -1), found["equal tokens, ties"][0])
    assert (found["two regions"][1] == 0).any()


@needs_triton
@pytest.mark.parametrize("name", WAYS)
def test_same_clusters_by_copies_in_graphs_and_under_autocast(found, name):
    x, grid, count, rounds = triton_clusters.CASES["a batch"]
    assert same(found[name], local_kmeans(x, grid, count, num_rounds=rounds))


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes a CPU")
def test_a_cpu_is_refused_in_plain_words():
    with pytest.raises(AiluRusError, match=r'needs a GPU, got tensors on a CPU: use kernel="torch", or set TRITON'):
        LocalKMeans(kernel="triton")(torch.randn(1, 12, 4), (3, 4), 5)


def test_without_triton_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(local_kmeans_triton, "triton", None)
    with pytest.raises(MissingExtraError, match=r'kernel="torch" does not: pip install "ailurus-hf\[triton\]"'):
        LocalKMeans(kernel="triton")(torch.randn(1, 12, 4), (3, 4), 5)


def test_an_unknown_kernel_is_named():
    for make in (LocalKMeans, lambda kernel: local_kmeans(torch.randn(1, 12, 4), (3, 4), 5, kernel=kernel)):
        with pytest.raises(AiluRusError, match="kernel must be one of 'torch', 'triton', got 'cuda'"):
            make(kernel="cuda")


def test_torchs_form_does_not_import_the_kernel():
    # torch may import Triton by itself.
    code = "import sys, ailurus_hf.clustering as c, torch; c.local_kmeans(torch.randn(1, 12, 4), (3, 4), 5)"
    code += "; assert 'ailurus_hf.clustering.local_kmeans_triton' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind, fields", [(AiluRusConfig, {"keep_ratio": 0.5}), (AiluRusDiffusionConfig, {})])
def test_the_setting_is_saved_and_copied(kind, fields):
    config = kind(**fields, clustering=LocalKMeans(kernel="triton"))
    assert config.to_dict()["clustering"] == {"name": "local_kmeans", "num_rounds": 3, "kernel": "triton"}
    assert kind.from_json(config.to_json()) == config != kind(**fields, clustering=LocalKMeans())
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert copied == config and copied.clustering.kernel == "triton"
    # Saved before there was a choice.
    old = {**config.to_dict(), "clustering": {"name": "local_kmeans", "num_rounds": 3}}
    assert kind.from_dict(old).clustering == LocalKMeans()


def test_shapes_alone_need_no_triton(monkeypatch):
    monkeypatch.setattr(local_kmeans_triton, "triton", None)
    clusters = LocalKMeans(kernel="triton")(torch.empty(2, 48, 16, device="meta"), (6, 8), 12)
    assert clusters.assignment.shape == (2, 48) and clusters.counts.shape == (2, 12)


def test_an_exported_program_holds_torchs_form(monkeypatch):
    monkeypatch.setattr(local_kmeans_triton, "triton", None)

    class Clusters(torch.nn.Module):
        def forward(self, x):
            return LocalKMeans(kernel="triton")(x, (6, 8), 12).assignment

    x = triton_clusters.CASES["a batch"][0]
    with torch.no_grad():
        exported = torch.export.export(Clusters(), (x,))
    assert "ailurus_hf" not in str(exported.graph)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(x), local_kmeans(x, (6, 8), 12).assignment)


@pytest.mark.parametrize("grid, num_cells", [((6, 8), 12), ((7, 5), 9), ((1, 9), 3), ((4, 6, 5), 13), ((3, 3), 9)])
def test_tokens_around_are_the_candidates_turned_around(grid, num_cells):
    around, candidates = (
        tokens_around(grid, num_cells, torch.device("cpu")),
        grid_cells(grid, num_cells, torch.device("cpu")).candidates,
    )
    for cell in range(num_cells):
        want = (candidates == cell).any(1).nonzero().flatten().tolist()
        assert around[cell].tolist() == want + [-1] * (around.shape[1] - len(want))
