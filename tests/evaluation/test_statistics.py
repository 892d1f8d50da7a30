"""Similarity, assignments and latency, against numbers worked by hand."""

import math

import pytest
import torch
from models import images, make_model, run

from ailurus_hf import AiluRusError, TokenClusters, ailurus_status, apply_ailurus, remove_ailurus
from ailurus_hf.evaluation import assignment_statistics, counted_flops, pair_preservation, reconstruction_similarity
from ailurus_hf.evaluation import latency as latency_module
from ailurus_hf.evaluation.latency import PARTS, Span, exclusive_times, latency_split
from benchmarks.harness import model_flops


def test_reconstruction_similarity_is_the_mean_cosine_of_the_patches():
    plain = torch.tensor([[[9.0, 9], [1, 0], [0, 2]]])  # a prefix token and two patches
    reduced = torch.tensor([[[-9.0, 0], [3, 0], [3, 3]]])
    found = reconstruction_similarity([plain, plain], [plain, reduced], prefix=1)
    assert found == pytest.approx([1, (1 + math.sqrt(0.5)) / 2])
    with pytest.raises(AiluRusError, match="do not match"):
        reconstruction_similarity([plain], [reduced[:, 1:]])
    with pytest.raises(AiluRusError, match="1 hidden"):
        reconstruction_similarity([plain], [])


def test_reduced_layers_differ_and_the_layers_before_do_not():
    model, x = make_model("Segmenter(ViT, mask transformer)"), images(2, (9, 13))
    with torch.no_grad():
        plain = run(model, x, output_hidden_states=True).hidden_states
        apply_ailurus(model, cluster_location=2, keep_ratio=0.5)
        reduced = run(model, x, output_hidden_states=True).hidden_states
    found = reconstruction_similarity(plain, reduced, prefix=1)
    assert len(found) == 5
    assert found[:3] == pytest.approx([1, 1, 1]) and all(0.3 < value < 0.999 for value in found[3:])


def angles(*degrees):
    radians = torch.tensor(degrees) * math.pi / 180
    return torch.stack([radians.cos(), radians.sin()], -1)[None]


def test_pairs_that_stay_in_their_interval():
    # Cosines before: 0-1 .966, 0-2 .5, 1-2 .707, with 3 (180 degrees): all negative.
    before = angles(0.0, 15.0, 60.0, 180.0)
    # After: 0-1 .985 (stays in .9 to 1), 0-2 .174 (leaves .5), 1-2 .342 (leaves .7).
    after = angles(0.0, 10.0, 80.0, 170.0)
    found = pair_preservation(before, after)
    assert found.pairs == [0, 0, 0, 0, 0, 1, 0, 1, 0, 1] and found.kept == [0] * 9 + [1]
    assert found.probability[5] == 0 and found.probability[9] == 1 and found.probability[0] is None
    assert found.intervals[3] == (0.3, 0.4)
    both = found + pair_preservation(before, before)
    assert both.pairs == [0, 0, 0, 0, 0, 2, 0, 2, 0, 2] and both.kept == [0, 0, 0, 0, 0, 1, 0, 1, 0, 2]
    # Equal tokens have a cosine of 1, rounding or not; every pair of a batch counts once, however rows are cut.
    same = torch.randn(1, 1, 7).expand(2, 600, 7)
    assert pair_preservation(same, same).kept[-1] == 2 * 600 * 599 // 2
    with pytest.raises(AiluRusError, match="not the same"):
        pair_preservation(before, after[:, 1:])


def test_statistics_of_an_assignment():
    # A 1 x 4 grid: tokens 0, 2 in one cluster (center 0) and 4, 9 as singletons.
    tokens = torch.tensor([0.0, 2, 4, 9])[None, :, None]
    clusters = TokenClusters.from_assignment(torch.tensor([[0, 0, 1, 2]]), 3, torch.tensor([[0, 2, 3]]))
    found = assignment_statistics(clusters, tokens, (1, 4))
    assert found.sizes == {1: 2, 2: 1} and found.singletons == pytest.approx(2 / 3)
    # Two tokens at distance 1 of their mean; all four at 3.75, 1.75, 0.25 and 5.25 of theirs.
    assert found.variance == pytest.approx(2 / 4)
    assert found.unexplained == pytest.approx(2 / (3.75**2 + 1.75**2 + 0.25**2 + 5.25**2))
    assert (found.reach, found.gap) == (1, 1)
    # Of 0, 2, 4 and 9 with their means 1, 1, 4, 9 the first has no direction.
    assert found.similarity == pytest.approx(3 / 4)
    with pytest.raises(AiluRusError, match="6 cells"):
        assignment_statistics(clusters, tokens, (2, 3))


def test_reach_is_to_the_own_center_and_gap_to_any():
    # A 1 x 5 grid. Token 3 belongs to the center at 0, although the one at 4 is nearer.
    clusters = TokenClusters.from_assignment(torch.tensor([[0, 0, 0, 0, 1]]), 2, torch.tensor([[0, 4]]))
    found = assignment_statistics(clusters, torch.randn(1, 5, 3), (1, 5))
    assert (found.reach, found.gap) == (3, 2)
    # Without centers: mean positions 1.5 and 4; an empty cluster is near to nothing.
    free = TokenClusters.from_assignment(torch.tensor([[0, 0, 0, 0, 1]]), 3)
    found = assignment_statistics(free, torch.randn(1, 5, 3), (1, 5))
    assert (found.reach, found.gap, found.sizes) == (1.5, 1.5, {0: 1, 1: 1, 4: 1})


def test_a_part_inside_another_counts_for_itself():
    spans = [
        Span("inner", 1, 3),
        Span("outer", 0, 7),
        Span("inner", 4, 5),
        Span("innermost", 1, 2),
        Span("outer", 7, 9),
    ]
    assert exclusive_times(spans) == {"outer": 1 + 1 + 2 + 2, "inner": 1 + 1, "innermost": 1}


@pytest.mark.parametrize("config", [{"keep_ratio": 0.5}, {"keep_ratio": 0.5, "restore": "copy"}, None])
def test_latency_by_part(config):
    model, x = make_model("Segmenter(ViT, mask transformer)"), images(1)
    if config:
        apply_ailurus(model, **config)
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for m in model.modules()]
    found = latency_split(model, lambda: run(model, x), repeats=3)
    assert set(found) == {*PARTS, "rest", "total"}
    assert all((found[part] > 0) == (config is not None) for part in ("cluster", "merge", "unmerge"))
    assert found["attention"] > 0 and found["mlp"] > 0 and found["rest"] > 0
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for m in model.modules()] == before
    if config:
        assert ailurus_status(model).locations[0].num_clusters == 48
        remove_ailurus(model)


@pytest.mark.parametrize("name", ["DeiTModel", "Segmenter(ViT, mask transformer)"])
def test_flops_counted_on_shapes_are_those_of_a_real_forward(name):
    model, x = make_model(name), images(1)
    found = counted_flops(model, {"pixel_values": x[..., :32]})
    assert found == model_flops(lambda: model(x[..., :32]))


def test_latency_of_something_else():
    class Other:
        def step(self):
            return 7

    other, model, x = Other(), make_model("ViTModel"), images(1)
    seen = []
    found = latency_split(
        model, lambda: (seen.append(other.step()), run(model, x)), timed=[(other, "step", "other")], repeats=1
    )
    assert found["other"] > 0 and seen == [7, 7] and "step" not in vars(other)
    assert latency_module.PARTS[0] == "cluster"
