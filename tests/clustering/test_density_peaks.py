"""Spatial density peaks against the oracle: exact, on random and adversarial input, in every form of the distances."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracle import Oracle

from ailurus_hf import AiluRusError, spatial_density_peaks
from ailurus_hf.clustering import neighbors, rows

GRIDS = [
    (1, 1),
    (1, 2),
    (2, 1),
    (1, 17),
    (13, 1),
    (2, 2),
    (3, 3),
    (4, 7),
    (9, 5),
    (12, 12),
    (2, 3, 4),
    (5, 4, 4),
    (1, 1, 9),
]


def agrees(features, grid, num_clusters, lam=50, alpha=0.9, k=1, margin=1e-6):
    """Compares every image of Tensor[B, N, C] with the oracle; False where all were too close for float32 to tell."""
    got = spatial_density_peaks(
        features, grid, num_clusters, num_spatial_neighbors=lam, alpha=alpha, num_density_neighbors=k
    )
    told = 0
    for image, assignment, centers in zip(features.double().numpy(), got.assignment, got.centers, strict=True):
        want = Oracle(image, grid, num_clusters, lam, alpha, k, margin)
        if want.fragile:
            continue
        told += 1
        assert centers.tolist() == want.centers
        assert assignment.tolist() == want.assignment
    assert torch.equal(got.counts.long(), torch.stack([a.bincount(minlength=num_clusters) for a in got.assignment]))
    return told > 0


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("lam", [0, 1, 8, 50])
def test_equals_oracle_on_random_features(grid, lam):
    count = math.prod(grid)
    generator = torch.Generator().manual_seed(1000 * count + lam)
    told = 0
    for num_clusters in sorted({1, max(count // 4, 1), max(count // 2, 1), count}):
        for k in (1, 3):
            features = torch.randn(3, count, 16, generator=generator)
            told += agrees(features, grid, num_clusters, lam, k=k)
    assert told


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_equals_oracle_on_ties(data):
    """Small whole numbers: many equal distances and duplicated tokens, exact in float32."""
    grid = data.draw(st.sampled_from(GRIDS), label="grid")
    count = math.prod(grid)
    features = data.draw(arrays("int8", (2, count, 3), elements=st.integers(-2, 2)), label="features")
    num_clusters = data.draw(st.integers(1, count), label="num_clusters")
    lam = data.draw(st.sampled_from([0, 1, 5, 24, 50]), label="lambda")
    alpha = data.draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]), label="alpha")
    k = data.draw(st.integers(1, 4), label="k")
    assume(agrees(torch.from_numpy(features).float(), grid, num_clusters, lam, alpha, k))


@pytest.mark.parametrize("grid", [(6, 9), (3, 4, 5), (24, 24)])
@pytest.mark.parametrize("kind", ["constant", "two values", "duplicated rows", "large norms", "one outlier", "offset"])
def test_equals_oracle_on_adversarial_images(grid, kind):
    count = math.prod(grid)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, count, 8, generator=generator)
    if kind == "constant":
        x = x[:, :1].expand(-1, count, -1).clone()
    elif kind == "two values":
        x = torch.where(torch.arange(count)[None, :, None] < count // 2, x[:, :1], x[:, 1:2])
    elif kind == "duplicated rows":
        x = x[:, torch.arange(count) // 3]
    elif kind == "large norms":
        x = x * 3e4
    elif kind == "one outlier":
        x[:, count // 2] *= 1e5
    elif kind == "offset":
        x = (x * 64).round() + 4096
    assert agrees(x, grid, count // 4, margin=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_arithmetic_is_float32_whatever_the_input_type(dtype):
    x = torch.randn(2, 96, 32, generator=torch.Generator().manual_seed(3)).to(dtype)
    got = spatial_density_peaks(x, (8, 12), 24)
    want = spatial_density_peaks(x.float(), (8, 12), 24)
    assert torch.equal(got.assignment, want.assignment)
    assert got.counts.dtype == torch.float32
    assert agrees(x.float(), (8, 12), 24)


@pytest.fixture(params=[True, False], ids=["in one pass", "by tiles"])
def of_products(monkeypatch, request):
    monkeypatch.setattr(neighbors, "DIRECT_DISTANCE_LIMIT", 0)
    monkeypatch.setattr(neighbors, "takes_operators", lambda table: request.param)


@pytest.mark.parametrize("grid", [*GRIDS, (17, 21), (3, 9, 10)])
@pytest.mark.parametrize("chunk_bytes", [1, 2**24])
def test_distances_of_products_equal_oracle(of_products, monkeypatch, grid, chunk_bytes):
    """Whole numbers keep the matrix products exact, so that ties stay ties."""
    monkeypatch.setitem(rows.CHUNK_BYTES, "cpu", chunk_bytes)
    count = math.prod(grid)
    x = torch.randint(-8, 9, (2, count, 6), generator=torch.Generator().manual_seed(count)).float()
    for lam in (0, 4, 50):
        agrees(x, grid, max(count // 3, 1), lam)
    x = torch.randn(6, count, 16, generator=torch.Generator().manual_seed(1))
    assert agrees(x, grid, max(count // 3, 1), lam=8, margin=2e-6)


@pytest.mark.parametrize("scale, offset, rtol", [(1.0, 0.0, 2e-6), (1e3, 0.0, 2e-6), (1.0, 1e4, 2e-6)])
def test_distances_of_products_are_accurate(of_products, scale, offset, rtol):
    x = torch.randn(2, 30 * 41, 24, generator=torch.Generator().manual_seed(0)) * scale + offset
    x[:, 5] = x[:, 6]
    x[:, 700] *= 1e3
    table = neighbors.grid_neighbors((30, 41), 50, x.device)
    got = neighbors.neighbor_distances(x, table)
    want = (x.double()[:, :, None] - x.double()[:, table.index]).norm(dim=-1)
    torch.testing.assert_close(got, want.float(), rtol=rtol, atol=0)
    pair = (table.index[5] == 6).nonzero()
    assert got[:, 5, pair].eq(0).all()


def test_same_alone_and_in_a_batch():
    x = torch.randn(5, 23 * 30, 48, generator=torch.Generator().manual_seed(0))
    together = spatial_density_peaks(x, (23, 30), 172)
    for image in range(5):
        alone = spatial_density_peaks(x[image : image + 1], (23, 30), 172)
        assert torch.equal(alone.assignment[0], together.assignment[image])
        assert torch.equal(alone.centers[0], together.centers[image])


def test_no_gradient_and_no_crash_on_nan():
    x = torch.randn(2, 48, 8, requires_grad=True)
    clusters = spatial_density_peaks(x, (6, 8), 12)
    assert not clusters.counts.requires_grad
    with torch.no_grad():
        x[0, 7] = math.nan
        x[1] = math.inf
    clusters = spatial_density_peaks(x, (6, 8), 12)
    assert clusters.assignment.min() >= 0 and clusters.assignment.max() < 12
    assert clusters.counts.sum() == 96
    with pytest.raises(AiluRusError, match="49 of 96 tokens are not finite"):
        spatial_density_peaks(x, (6, 8), 12, check_finite=True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"grid": (6, 7)}, "42 cells, but there are 48 tokens"),
        ({"grid": (48,)}, r"\(H, W\) or \(T, H, W\)"),
        ({"grid": (-6, -8)}, "at least 1"),
        ({"num_clusters": 0}, "between 1 and the 48 tokens, got 0"),
        ({"num_clusters": 49}, "between 1 and the 48 tokens, got 49"),
        ({"num_spatial_neighbors": -1}, "got -1"),
        ({"alpha": 1.5}, "between 0 and 1, got 1.5"),
        ({"num_density_neighbors": 0}, "at least 1, got 0"),
        ({"features": torch.zeros(48, 8)}, r"got \(48, 8\)"),
        ({"features": torch.zeros(1, 48, 8, dtype=torch.long)}, "int64"),
    ],
)
def test_bad_input_names_the_number(change, message):
    arguments = {"features": torch.randn(1, 48, 8), "grid": (6, 8), "num_clusters": 12, **change}
    with pytest.raises(AiluRusError, match=message):
        spatial_density_peaks(**arguments)


def test_compiles_for_several_sizes_without_recompiling_for_images():
    compiled = torch.compile(spatial_density_peaks, fullgraph=True, backend="aot_eager")
    for grid in ((6, 8), (9, 7)):
        for seed in range(2):
            x = torch.randn(2, math.prod(grid), 8, generator=torch.Generator().manual_seed(seed))
            with torch._dynamo.config.patch(error_on_recompile=seed > 0):
                got = compiled(x, grid, 12)
            assert torch.equal(got.assignment, spatial_density_peaks(x, grid, 12).assignment)


def test_tables_made_under_inference_mode_serve_training():
    grid = (5, 31)
    with torch.inference_mode():
        spatial_density_peaks(torch.randn(1, 155, 8), grid, 9)
    x = torch.randn(1, 155, 8, requires_grad=True)
    clusters = spatial_density_peaks(x, grid, 9)
    clusters.unmerge(clusters.merge(x)).sum().backward()
    assert x.grad is not None
