"""What `pairs` and `ward` share, joining clusters in rounds: any numbers give clusters, bad input names the number."""

import math

import pytest
import torch

from ailurus_hf import AiluRusError
from ailurus_hf.clustering import join_clusters, join_regions, pairs, ward

GRID = (6, 8)


@pytest.fixture
def tokens():
    return torch.randn(2, 48, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("cluster", [pairs, ward])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 3e38])
def test_what_is_no_number_gives_some_clusters(tokens, wrong, cluster):
    tokens[0, 3, 1] = wrong
    tokens[0, 7] = wrong
    found = cluster(tokens, GRID, 10)
    assert found.counts.sum(1).tolist() == [48, 48] and found.num_clusters == 10
    assert torch.equal(found.assignment[1:], cluster(tokens[1:], GRID, 10).assignment)


@pytest.mark.parametrize("cluster, join", [(pairs, join_clusters), (ward, join_regions)])
def test_bad_input_names_the_number(tokens, cluster, join):
    found = cluster(tokens, GRID, 12)
    with pytest.raises(AiluRusError, match="between 1 and the 48 tokens, got 0"):
        cluster(tokens, GRID, 0)
    with pytest.raises(AiluRusError, match="48"):
        cluster(tokens, (6, 9), 12)
    with pytest.raises(AiluRusError, match="between 1 and the 12 tokens, got 13"):
        join(found, found.merge(tokens), tokens, GRID, 13)
    tokens[0, 3] = math.nan
    with pytest.raises(AiluRusError, match="1 of 96 tokens"):
        cluster(tokens, GRID, 12, check_finite=True)


@pytest.mark.parametrize("cluster", [pairs, ward])
def test_what_all_tokens_share_costs_no_precision(cluster):
    small = torch.randint(-64, 64, (2, 48, 16), generator=torch.Generator().manual_seed(0)) / 1024
    # Exact in fp32, and so large that sums of several would not be.
    found = cluster(small + 1000, GRID, 10)
    assert torch.equal(found.assignment, cluster(small, GRID, 10).assignment)
