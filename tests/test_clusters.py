"""TokenClusters: merging and unmerging against plain loops, gradients, half precision, errors."""

import pytest
import torch

from ailurus_hf import AiluRusError, TokenClusters
from ailurus_hf.clusters import stable_argsort


@pytest.fixture
def clusters():
    """Cluster 3 is empty in the first image."""
    return TokenClusters.from_assignment(torch.tensor([[0, 2, 2, 1, 2, 0, 1], [3, 3, 3, 1, 2, 0, 1]]), 4)


def test_merge_is_the_mean_and_unmerge_copies(clusters):
    x = torch.randn(2, 7, 5)
    merged, unmerged = clusters.merge(x), clusters.unmerge(clusters.merge(x))
    for image in range(2):
        for cluster in range(4):
            members = clusters.assignment[image] == cluster
            want = x[image, members].mean(0) if members.any() else torch.zeros(5)
            torch.testing.assert_close(merged[image, cluster], want)
            torch.testing.assert_close(unmerged[image, members], want.expand(int(members.sum()), -1))
    assert clusters.counts.tolist() == [[2, 2, 3, 0], [1, 2, 1, 3]]
    assert clusters.log_counts(1, 2).shape == (2, 7)
    assert clusters.log_counts(1)[0, -1] == -torch.inf


def test_gradients(clusters):
    x = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(clusters.merge, x)
    y = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(clusters.unmerge, y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(clusters, dtype):
    x = torch.randn(2, 7, 64).to(dtype)
    merged = clusters.merge(x)
    assert merged.dtype == dtype
    torch.testing.assert_close(merged, clusters.merge(x.float()).to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def test_wrong_shapes_are_named(clusters):
    with pytest.raises(AiluRusError, match=r"merge expects a tensor of shape \(2, 7, C\), got \(2, 6, 5\)"):
        clusters.merge(torch.randn(2, 6, 5))
    with pytest.raises(AiluRusError, match=r"unmerge expects a tensor of shape \(2, 4, C\), got \(1, 4, 5\)"):
        clusters.unmerge(torch.randn(1, 4, 5))


class Sorted(torch.nn.Module):
    """Tokens in ascending and in descending order of their values."""

    def forward(self, values):
        return stable_argsort(values), stable_argsort(values, descending=True)


@pytest.mark.parametrize("count", [50, 4096, 4097])
def test_an_exported_sort_keeps_equal_values_in_order_without_a_stable_sort(count):
    """OpenVINO's stable sort takes time with the square of the tokens. Up to 4096 of them floats count exactly."""
    values = torch.randint(count // 4, (2, count), generator=torch.Generator().manual_seed(0)).float()
    values[0, 7::3] = torch.inf
    program = torch.export.export(Sorted(), (values[:1],))
    assert {str(node.target) for node in program.graph.nodes if "sort" in str(node.target)} <= {
        "aten.sort.default",
        "aten.argsort.default",
    }
    for row in values.split(1):
        for got, want in zip(program.module()(row), Sorted()(row), strict=True):
            assert torch.equal(got, want)
