"""Layer inputs beside tokens follow the clusters: rotary embeddings, relative position bias, nested clusters."""

import math

import pytest
import torch
from models import images, make_model, patchified
from transformers import BeitConfig, DINOv3ViTConfig
from transformers.models.beit.modeling_beit import BeitRelativePositionBias
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTRopePositionEmbedding

from ailurus_hf import AiluRusError, TokenClusters, apply_ailurus
from ailurus_hf.clustering import get_clustering
from ailurus_hf.vision.adapters import relative_bias_of_clusters, rotary_at_centroids
from ailurus_hf.vision.forward_state import Reduction

GRIDS = [(5, 7), (8, 12), (16, 6), (3, 9), (1, 2)]


def reduction_of(clusters, grid):
    tokens = torch.zeros(len(clusters.assignment), math.prod(grid), 4)
    return Reduction(1, grid, clusters, tokens, clusters.merge(tokens))


def every_token(grid):
    count = math.prod(grid)
    return TokenClusters.from_assignment(torch.arange(count).expand(2, -1), count)


def random_clusters(grid, num_clusters, seed=0):
    generator = torch.Generator().manual_seed(seed)
    some = torch.randint(num_clusters, (2, math.prod(grid) - num_clusters), generator=generator)
    every = torch.arange(num_clusters).expand(2, -1)
    return TokenClusters.from_assignment(torch.cat([every, some], 1), num_clusters)


def rope(grid):
    config = DINOv3ViTConfig(hidden_size=32, num_attention_heads=2, image_size=64, patch_size=4)
    module = DINOv3ViTRopePositionEmbedding(config).eval()
    return module, module(torch.zeros(1, 3, grid[0] * 4, grid[1] * 4))


@pytest.mark.parametrize("grid", GRIDS)
def test_where_all_tokens_are_kept_they_keep_their_rotation(grid):
    _, rotary = rope(grid)
    for got, want in zip(rotary_at_centroids(rotary, reduction_of(every_token(grid), grid)), rotary, strict=True):
        torch.testing.assert_close(got, want.expand(2, 1, -1, -1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if min(grid) > 4])
def test_a_cluster_rotates_as_a_patch_at_its_centroid_would(grid):
    module, rotary = rope(grid)
    reduction = reduction_of(random_clusters(grid, 9), grid)
    # As the model makes them: centers of patches, from -1 to 1 along each side.
    coordinates = (reduction.centroids() + 0.5) / torch.tensor(grid) * 2 - 1
    angles = (2 * math.pi * coordinates[..., None] * module.inv_freq).flatten(2).tile(2)
    cos, sin = rotary_at_centroids(rotary, reduction)
    torch.testing.assert_close(cos[:, 0], angles.cos(), rtol=0, atol=1e-4)
    torch.testing.assert_close(sin[:, 0], angles.sin(), rtol=0, atol=1e-4)


def test_along_a_short_side_a_cluster_rotates_as_the_patch_nearest_to_its_centroid():
    grid = (3, 4)
    _, rotary = rope(grid)
    # Columns 0 and 1 of a row are one cluster: its centroid is at column 0.5, which rounds to 0.
    assignment = torch.tensor([[0, 0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8]])
    reduction = reduction_of(TokenClusters.from_assignment(assignment, 9), grid)
    cos, _ = rotary_at_centroids(rotary, reduction)
    torch.testing.assert_close(cos[0, 0], rotary[0][[0, 2, 3, 4, 6, 7, 8, 10, 11]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
def test_where_all_tokens_are_kept_the_relative_bias_is_the_models(grid):
    torch.manual_seed(0)
    config = BeitConfig(hidden_size=32, num_attention_heads=4, image_size=32, patch_size=4)
    module = BeitRelativePositionBias(config)
    torch.nn.init.normal_(module.relative_position_bias_table)
    with torch.no_grad():
        want = module(grid, interpolate_pos_encoding=True, dim_size=math.prod(grid) + 1)
        got = relative_bias_of_clusters(module, reduction_of(every_token(grid), grid))
    torch.testing.assert_close(got, want.view_as(got[:1]).expand_as(got), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", [(6, 8), (5, 7), (2, 9)])
@pytest.mark.parametrize("clustering", ["density_peaks", "local_kmeans", "pairs"])
def test_the_clusters_of_a_second_place_are_unions_of_the_firsts(grid, clustering):
    count = math.prod(grid)
    tokens = torch.randn(2, count, 8, generator=torch.Generator().manual_seed(1))
    cluster = get_clustering(clustering)
    first = cluster(tokens, grid, count // 2)
    second = cluster.join(first, first.merge(tokens), tokens, grid, 4)
    assert second.num_clusters == 4 and second.counts.min() >= 1
    assert torch.equal(second.counts.sum(1), torch.full((2,), float(count)))
    for image in range(2):
        for cluster in range(first.num_clusters):
            assert len(second.assignment[image][first.assignment[image] == cluster].unique()) <= 1


def test_images_packed_into_one_sequence_are_refused():
    model = apply_ailurus(make_model("RadioModel"), cluster_location=1, keep_ratio=0.25)
    with pytest.raises(AiluRusError, match="RadioModel was given images packed into one sequence"):
        model(torch.randn(96, 48), image_grid_hw=torch.tensor([[8, 12]]))


def test_images_of_different_grids_are_refused():
    model = apply_ailurus(make_model("Siglip2VisionModel"), cluster_location=1, keep_ratio=0.25)
    given = {}
    given["pixel_values"] = patchified(images(2), 4, given)
    wrong = {**given, "spatial_shapes": torch.tensor([[8, 12], [12, 8]])}
    with pytest.raises(AiluRusError, match="2 different grids"):
        model(**wrong)
    mask = given["pixel_attention_mask"].clone()
    mask[1, 90:] = 0
    with pytest.raises(AiluRusError, match="open for the 96 patches"):
        model(**{**given, "pixel_attention_mask": mask})
    model(**given)
