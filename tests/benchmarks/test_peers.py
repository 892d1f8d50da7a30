"""The peers: each one's steps against cases worked by hand, its published FLOPs, and what all of them must do."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from models import blocky_images_for, images, make_model, predict, run, without_positions
from traces import traces
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from ailurus_hf import AiluRusError, UnsupportedModelError, apply_ailurus, remove_ailurus
from ailurus_hf.vision.backend import parameters_of
from ailurus_hf.vision.discovery import find_encoders
from benchmarks.harness import model_flops
from benchmarks.peers import act, algm, ctm, cubistmerge, evit, expedite, pitome, structsam, tome
from benchmarks.peers.hooks import Peer, attach

# Settings that reduce the tiny models of models.py, and settings that leave every token.
REDUCING = {
    "ToMe": (tome, {"r": 10}),
    "EViT": (evit, {"keep": 0.5}),
    "EViT, fused": (evit, {"keep": 0.5, "restore": "fused", "restore_at": "decoder"}),
    "Expedite": (expedite, {"location": 1, "cells": (4, 6)}),
    "CTM": (ctm, {"location": 0, "keep": 0.3}),
    "ALGM": (algm, {}),
    "ACT": (act, {"rounds": 8, "interval": 20.0}),
    "PiToMe": (pitome, {"keep": 0.9}),
    "CubistMerge": (cubistmerge, {"location": 1, "cells": (4, 6)}),
    "StructSAM": (structsam, {"keep": 0.5}),
    "StructSAM, once": (structsam, {"keep": 0.5, "location": 1, "restore_at": "decoder"}),
}
# These leave all tokens between layers.
ATTENTION_ALONE = ("ACT", "StructSAM")
IDLE = {
    "ToMe": (tome, {"r": 0}),
    "EViT": (evit, {"keep": 1.0}),
    "Expedite": (expedite, {"location": 1, "cells": (20, 20)}),
    "CTM": (ctm, {"location": 0, "keep": 1.0}),
    "ALGM": (algm, {"thresholds": (1.1, 1.1)}),
    "PiToMe": (pitome, {"keep": 1.0}),
    "CubistMerge": (cubistmerge, {"location": 1, "cells": (20, 20)}),
    "StructSAM": (structsam, {"keep": 1.0}),
    "StructSAM, once": (structsam, {"keep": 1.0, "location": 1}),
}
MODELS = ("Segmenter(ViT, mask transformer)", "DeiTWithTeacher", "Dinov2WithRegistersModel", "CLIPVisionModel")


@pytest.fixture(autouse=True)
def layers_that_take_masks(request):
    """The peers weigh tokens by a mask; skips where layers of this version of transformers take none."""
    name = request.node.callspec.params.get("name", "") if hasattr(request.node, "callspec") else ""
    if name.startswith("Dinov2"):
        (found,) = find_encoders(make_model(name))
        if "attention_mask" not in parameters_of(found.layers[0]):
            pytest.skip(f"the layers of {name} take no mask in this version of transformers")


def at_angles(*degrees):
    radians = torch.tensor(degrees) * math.pi / 180
    return torch.stack([radians.cos(), radians.sin()], -1)[None]


# Each method's steps.


def test_tome_merges_the_best_edges_and_keeps_the_rest_in_order():
    # Second set: 0, 90, 180 and 270 degrees. Edges of the first: 5 -> 0 (5 apart), 70 -> 90 (20 apart), 100 -> 90 (10
    # apart), 255 -> 270 (15 apart).
    matching = tome.bipartite_matching(at_angles(0.0, 5.0, 90.0, 70.0, 180.0, 100.0, 270.0, 255.0), 2)
    assert matching.kept.tolist() == [[1, 3]] and matching.merged.tolist() == [[0, 2]]
    assert matching.to.tolist() == [[2, 2, 3, 0, 4, 3, 5, 1]]
    tokens = torch.arange(8.0)[None, :, None]
    sizes = torch.tensor([[1.0, 2, 1, 1, 1, 3, 1, 1]])
    merged, sizes = tome.merge_matched(tokens, sizes, matching)
    # Tokens 3 and 7 alone; (0·1 + 1·2) / 3; (2·1 + 5·3) / 4; tokens 4 and 6 alone.
    torch.testing.assert_close(merged[0, :, 0], torch.tensor([3, 7, 2 / 3, 17 / 4, 4, 6]))
    assert sizes.tolist() == [[1, 1, 3, 4, 1, 1]]


def tiny_evit(restore, keep=0.5):
    config = ViTConfig(
        hidden_size=1, num_hidden_layers=4, num_attention_heads=1, intermediate_size=1, image_size=2, patch_size=1
    )
    peer = evit.EViT(find_encoders(ViTModel(config, add_pooling_layer=False))[0], keep=keep, restore=restore)
    peer.num_tokens = 4
    peer.begin()
    return peer


def evit_merge(peer, sequence, weights):
    peer.queries, peer.keys = {0: {"output": torch.ones(1, len(sequence), 1)}}, {}
    peer.keys[0] = {"output": torch.tensor(weights).log()[None, :, None]}
    return peer.merge(torch.tensor(sequence)[None, :, None], 0)[0, :, 0].tolist()


def test_evit_keeps_what_cls_attends_to_and_fuses_the_rest():
    query, key = torch.ones(1, 3, 1), torch.tensor([1.0, 2, 3]).log()[None, :, None]
    torch.testing.assert_close(evit.cls_attention(query, key, 1), torch.tensor([[1 / 6, 2 / 6, 3 / 6]]))
    for restore, expected in (("last", [100, 200, 30, 40]), ("fused", [100, 200, 7, 7])):
        peer = tiny_evit(restore)
        # Attention .2, .4, .1, .2: tokens 1 and 0 stay (of equals the first), 40 · .2 + 30 · .1 is fused.
        merged = evit_merge(peer, [9.0, 10, 20, 30, 40], [1.0, 2, 4, 1, 2])
        assert merged == pytest.approx([9, 20, 10, 11])
        assert peer.unmerge(torch.tensor([[[200.0], [100], [7]]]))[0, :, 0].tolist() == expected


def test_evit_drops_twice():
    for restore, expected in (("last", [1, 21, 30, 40]), ("fused", [1, 3, 2, 2])):
        peer = tiny_evit(restore)
        evit_merge(peer, [9.0, 10, 20, 30, 40], [1.0, 2, 4, 1, 2])
        # Of 21, 11 (tokens 1 and 0) and the fused 7, the fused one and token 0 stay.
        assert evit_merge(peer, [9.0, 21, 11, 7], [1.0, 1, 3, 5]) == pytest.approx([9, 7, 11, 2.1])
        assert peer.unmerge(torch.tensor([[[2.0], [1], [3]]]))[0, :, 0].tolist() == expected


def test_expedite_clusters_softly_within_reach():
    column = torch.tensor([0.0, 2])[None, :, None]
    # Squared distances 0 and 4 at tau = ln 2: memberships 16/17 and 1/17.
    centers = expedite.cluster(column, (1, 2), (1, 2), math.log(2), 1, 2)
    torch.testing.assert_close(centers[0, :, 0], torch.tensor([2 / 17, 32 / 17]))
    column = torch.tensor([0.0, 8, 9, 10])[None, :, None]
    # Pooled: 4 and 9.5. At a huge tau each token has one center: 0 the first, the others the second.
    assert expedite.cluster(column, (1, 4), (1, 2), 1e4, 3, 2)[0, :, 0].tolist() == pytest.approx([0, 9])
    # Only its own cell within reach: the pooled cells stay.
    assert expedite.cluster(column, (1, 4), (1, 2), 1e4, 3, 0)[0, :, 0].tolist() == pytest.approx([4, 9.5])
    near = expedite.cells_near((4, 2), (4, 1), 1, torch.device("cpu"))
    assert near[::2].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]


def test_expedite_reconstructs_from_the_nearest_centers_with_weights_of_unit_norm():
    tokens, centers = torch.tensor([0.0, 1])[None, :, None], torch.tensor([0.0, 2, 9])[None, :, None]
    values = torch.tensor([10.0, 20, 99])[None, :, None]
    unmerge = expedite.reconstruction(tokens, centers, math.log(2), 2)
    # Token 0: weights 1 and 1/16; token 1 stands half-way.
    expected = [(10 + 20 / 16) / math.sqrt(1 + 1 / 256), 30 / math.sqrt(2)]
    assert unmerge(values)[0, :, 0].tolist() == pytest.approx(expected)
    # Weights of distant tokens are all but zero before they are normalized.
    far = expedite.reconstruction(tokens + 1e4, centers, 0.02, 2)
    assert far(values)[0, :, 0].tolist() == pytest.approx([99, 99])


def test_ctm_finds_the_densest_token_of_each_group():
    # With k = 3 (a token itself among them) the middle of each group is densest; they stand 5 apart.
    tokens = torch.tensor([0.0, 0.1, 0.2, 5, 5.1, 5.2])[None, :, None]
    clusters = ctm.dpc_knn(tokens, 2, 3)
    assert clusters.centers.tolist() == [[1, 4]] and clusters.assignment.tolist() == [[0, 0, 0, 1, 1, 1]]
    same = ctm.dpc_knn(torch.ones(1, 5, 2), 3)
    assert same.counts.min() >= 1


def test_algm_windows_and_matching():
    # Three alike and one at a right angle: of six pairs three have cosine 1.
    window = at_angles(0.0, 0.0, 0.0, 90.0)
    torch.testing.assert_close(algm.window_cosines(window, (2, 2)), torch.tensor([[[0.5]]]))
    # Odd sides: the last column belongs to no window.
    chosen = torch.tensor([[[True, False]]])
    assert algm.merge_windows(chosen, (2, 5)).tolist() == [[0, 0, 1, 2, 3, 0, 0, 4, 5, 6]]
    mean, deviation = algm.pair_cosines(at_angles(0.0, 0.0, 90.0, 30.0), torch.tensor([[1.0, 1, 1, 0]]))
    assert mean.item() == pytest.approx(1 / 3) and deviation.item() == pytest.approx(math.sqrt(2) / 3)
    tokens = at_angles(0.0, 5.0, 90.0, 70.0, 180.0, 100.0)
    threshold = torch.tensor([math.cos(math.radians(15))])
    assert algm.match_above(tokens, torch.ones(1, 6), threshold).tolist() == [[0, 0, 1, 2, 3, 1]]
    # As padding, 90 degrees takes nobody: 100 goes to nothing within 15 degrees.
    present = torch.tensor([[1.0, 1, 0, 1, 1, 1]])
    assert algm.match_above(tokens, present, threshold).tolist() == [[0, 0, 1, 2, 3, 4]]


def test_algm_calibrates_on_the_plain_model():
    model, x = make_model("ViTModel"), images(2)
    local, middle = algm.calibrate(
        model, [{"pixel_values": image[None], "interpolate_pos_encoding": True} for image in x]
    )
    tokens = []
    handles = [
        model.layers[i].layernorm_after.register_forward_pre_hook(lambda m, args: tokens.append(args[0][:, 1:]))
        for i in (0, 1)
    ]
    with torch.no_grad():
        model(x, interpolate_pos_encoding=True)
    for handle in handles:
        handle.remove()
    for found, sequence in zip((local, middle), tokens, strict=True):
        mean, deviation = algm.pair_cosines(sequence, torch.ones(sequence.shape[:2]))
        assert found == pytest.approx((mean + deviation).mean().item(), abs=1e-5)


def test_act_groups_equal_hashes_and_attends_from_their_means():
    clusters = act.groups(torch.tensor([[5, 3, 5, 7], [1, 1, 1, 1]]))
    assert clusters.assignment.tolist() == [[1, 0, 1, 2], [0, 0, 0, 0]]
    assert clusters.counts.tolist() == [[1, 2, 1], [4, 0, 0]]
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 6, 4)
    # Buckets wider than all queries: one prototype, the mean.
    out, share = act.clustered_attention(q, k, v, 1, 1e6)
    expected = F.scaled_dot_product_attention(q.mean(2, keepdim=True), k, v).expand_as(out)
    torch.testing.assert_close(out, expected)
    assert share == pytest.approx(1 / 6)
    out, share = act.clustered_attention(q, k, v, 8, 1e-3)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
    assert share == 1
    doubled = torch.cat([q, q], 2)
    assert torch.equal(*act.hashes(doubled, 4, 0.5).chunk(2, -1))


def test_act_hashes_are_the_digits_of_its_projections():
    generator = torch.Generator().manual_seed(0)
    (a, c), (b, d) = (
        torch.randn(1, 2, generator=generator)[0].tolist(),
        (torch.rand(2, generator=generator) * 0.5).tolist(),
    )
    queries = [-3.0, -0.2, 0.0, 0.4, 7.0]
    expected = [math.floor((a * q + b) / 0.5) + 4 * math.floor((c * q + d) / 0.5) for q in queries]
    assert act.hashes(torch.tensor(queries)[:, None], 2, 0.5).tolist() == expected


# What they share.


class Pairs(Peer):
    """Each two neighboring tokens become their mean, in the second layer."""

    def add_hooks(self):
        self.merge_inside(1, self.merge)

    def merge(self, sequence, index):
        prefix, tokens = self.split(sequence)
        self.unmerge = lambda x: x.repeat_interleave(2, 1)
        return torch.cat([prefix, tokens.unflatten(1, (-1, 2)).mean(2)], 1)


@pytest.mark.parametrize("name", ["ViTModel", "Dinov2Model"])
def test_merging_inside_a_layer_is_what_its_forward_would_do(name):
    model, x = make_model(name), images(1)
    layer, seen = find_encoders(model)[0].layers[1], {}
    parts = dict(layer.named_children())
    norms = (parts["norm1"], parts["norm2"]) if "norm1" in parts else (layer.layernorm_before, layer.layernorm_after)
    scale = parts.get("layer_scale2", lambda y: y)
    handle = norms[0].register_forward_pre_hook(lambda m, args: seen.setdefault("input", args[0]))
    with torch.no_grad():
        with attach(model, Pairs):
            hidden = run(model, x, output_hidden_states=True).hidden_states
        handle.remove()
        attended = layer.attention(norms[0](seen["input"]))[0]
        after = seen["input"] + parts.get("layer_scale1", lambda y: y)(attended)
        merged = torch.cat([after[:, :1], after[:, 1:].unflatten(1, (-1, 2)).mean(2)], 1)
        expected = merged + scale(layer.mlp(norms[1](merged)))
    torch.testing.assert_close(hidden[2], torch.cat([expected[:, :1], expected[:, 1:].repeat_interleave(2, 1)], 1))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", REDUCING)
def test_reduces_alone_as_in_a_batch_and_leaves_no_trace(method, name):
    module, settings = REDUCING[method]
    model, x = make_model(name), images(2, (9, 13))
    plain, before = predict(model, name, x), traces(model)
    with module.apply(model, **settings) as applied:
        reduced = predict(model, name, x)
        counts = applied.peers[0].token_counts
        alone = torch.cat([predict(model, name, x[i : i + 1]) for i in range(2)])
        states = run(model, x, output_hidden_states=True).hidden_states if name.startswith("Dino") else ()
    assert reduced.shape == plain.shape and torch.isfinite(reduced).all()
    assert not torch.allclose(reduced, plain, atol=1e-3)
    torch.testing.assert_close(alone, reduced, atol=1e-4, rtol=1e-4)
    assert counts[0] == 117 and (counts[-1] == 117 if method in ATTENTION_ALONE else counts[-1] < 90)
    # Registers and CLS stand before the tokens.
    assert all(state.shape[1] == 4 + 117 for state in states)
    assert torch.equal(predict(model, name, x), plain)
    if not states:  # transformers leaves its own recording hooks
        assert traces(model) == before


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", IDLE)
def test_nothing_to_merge_changes_nothing(method, name):
    module, settings = IDLE[method]
    model, x = make_model(name), images(2)
    plain = predict(model, name, x)
    with module.apply(model, **settings) as applied:
        assert torch.equal(predict(model, name, x), plain)
        assert set(applied.peers[0].token_counts) == {96}


@pytest.mark.parametrize(
    ("module", "settings"),
    [
        (tome, {"r": [12, 8, 0, 0]}),
        (algm, {"thresholds": (0.9999, 0.9999)}),
        (structsam, {"keep": 0.75, "location": 1}),
    ],
)
@pytest.mark.parametrize("name", ["ViTModel", "Segmenter(ViT, mask transformer)"])
def test_merging_equal_tokens_changes_nothing(module, settings, name):
    model, x = without_positions(make_model(name)), blocky_images_for(name)
    plain = predict(model, name, x)
    for restore_at in ("backbone", "decoder"):
        with module.apply(model, **settings, restore_at=restore_at) as applied:
            torch.testing.assert_close(predict(model, name, x), plain, atol=2e-3, rtol=1e-3)
            assert applied.peers[0].token_counts[-1] <= 76


def test_algm_pads_images_that_keep_more_tokens():
    name = "Segmenter(ViT, mask transformer)"
    model = without_positions(make_model(name))
    x = torch.cat([blocky_images_for(name, 1), images(1)])
    for proportional in (True, False):
        with algm.apply(model, thresholds=(0.9999, 0.9999), proportional=proportional) as applied:
            together = predict(model, name, x)
            assert (applied.peers[0].sizes == 0).any()
            alone = torch.cat([predict(model, name, x[i : i + 1]) for i in range(2)])
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_is_refused():
    model = make_model("IJepaModel")
    with pytest.raises(UnsupportedModelError, match="no CLS"):
        evit.apply(model)
    assert not model._forward_pre_hooks
    for name in ("DINOv3ViTModel", "BeitModel", "YOLOS", "Dinov2Backbone"):
        with pytest.raises(UnsupportedModelError, match="beside tokens"):
            tome.apply(make_model(name))
    model = make_model("ViTModel")
    with tome.apply(model, r=1), pytest.raises(AiluRusError, match="already"):
        ctm.apply(model, location=1, keep=0.5)
    apply_ailurus(model, keep_ratio=0.5)
    with pytest.raises(AiluRusError, match="already"):
        tome.apply(model)
    remove_ailurus(model)
    wrong = [(tome, {"r": -1}), (evit, {"keep": 0.0}), (expedite, {"location": 4, "cells": (2, 2)})]
    wrong += [(ctm, {"location": 1, "keep": 2.0}), (algm, {"local": 3}), (act, {"rounds": 33})]
    wrong += [(tome, {"restore_at": "head"}), (evit, {"restore": "first"}), (expedite, {"location": 1, "cells": (2,)})]
    wrong += [(pitome, {"keep": 0.4}), (cubistmerge, {"location": 1, "cells": (2,)}), (structsam, {"location": 4})]
    for module, settings in wrong:
        with pytest.raises(AiluRusError):
            module.apply(model, **settings)
    assert not model._forward_pre_hooks


# Multiply-adds in billions, as the papers count them: ToMe's table 4 and figure 3 (DeiT-S), EViT's table 1 (DeiT-S),
# and AiluRus' table 8 for Expedite (DeiT-B). Published with one decimal.
PUBLISHED = {
    "DeiT-S": [
        (None, {}, 4.6),
        (tome, {"r": 8}, 3.4),
        (tome, {"r": 13}, 2.7),
        (tome, {"r": 16}, 2.3),
        (evit, {"keep": 0.9}, 4.0),
        (evit, {"keep": 0.8}, 3.5),
        (evit, {"keep": 0.7}, 3.0),
        (evit, {"keep": 0.6}, 2.6),
        (evit, {"keep": 0.5}, 2.3),
    ],
    "DeiT-B": [
        (expedite, {"location": 2, "cells": (11, 11)}, 12.1),
        (expedite, {"location": 4, "cells": (12, 12)}, 14.7),
        (expedite, {"location": 6, "cells": (12, 12)}, 15.5),
    ],
}


@pytest.mark.parametrize("geometry", PUBLISHED)
def test_published_flops(geometry):
    width = {"DeiT-S": 384, "DeiT-B": 768}[geometry]
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}
    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig(**sizes, num_labels=1000)).eval()
    model = copy.deepcopy(model).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.zero_()
    x = torch.zeros(1, 3, 224, 224)
    for module, settings, published in PUBLISHED[geometry]:
        if module is None:
            counted = model_flops(lambda: model(x))
        else:
            with module.apply(model, **settings):
                counted = model_flops(lambda: model(x))
        assert counted / 2e9 == pytest.approx(published, rel=0.02), (module, settings)
