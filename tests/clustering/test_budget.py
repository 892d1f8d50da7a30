"""M by content: the share of detail, its bounds in a model, and what refuses it."""

import pytest
import torch
from models import CASES, images, make_model, predict, without_positions
from segformer import make as make_segformer

from ailurus_hf import AiluRusConfig, AiluRusError, ailurus_status, apply_ailurus
from ailurus_hf.clustering.budget import detail

NAME = "ViTForImageClassification"
RANGE = {"cluster_location": 1, "keep_ratio": 0.75, "min_keep_ratio": 0.25}
GRID = (12, 9)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def half_noise():
    tokens = noise(1, *GRID, 16)
    tokens[:, :, 5:] = tokens[:, :1, :1]
    return tokens.flatten(1, 2)


@pytest.mark.parametrize("scale, shift", [(1, 0), (1e-3, 0), (100, 0), (1, 5.0)])
def test_detail_is_none_all_or_a_share(scale, shift):
    flat = noise(1, 1, 16).expand(1, 108, 16)
    # Equal tokens as half precision leaves them.
    rounded = flat * (1 + noise(1, 108, 16) * 2**-9)
    ramp = torch.arange(108.0)[None, :, None] / 9 * noise(1, 1, 16)
    shares = [
        detail(scale * tokens + shift, GRID).item() for tokens in (flat, rounded, ramp, half_noise(), noise(1, 108, 16))
    ]
    assert shares[:3] == [0, 0, 0] and shares[4] == 1
    assert shares[3] == pytest.approx(5 / 9, abs=0.02)  # so many of the columns


def test_detail_is_of_each_image_and_any_grid():
    batch = torch.cat([half_noise(), noise(1, 108, 16)])
    assert torch.equal(detail(batch, GRID), torch.cat([detail(each[None], GRID) for each in batch]))
    for grid in ((1, 1), (1, 108), (3, 6, 6)):
        count = torch.tensor(grid).prod()
        assert 0 <= detail(noise(1, count, 8), grid).item() <= 1


@pytest.mark.parametrize("name", [NAME, "Segmenter(ViT, mask transformer)", "Dinov2Backbone"])
def test_flat_images_keep_the_least_and_noise_the_most(name):
    model = apply_ailurus(without_positions(make_model(name)), **RANGE)
    kept = {}
    for kind, x in (
        ("flat", torch.ones(1, 3, 32, 48)),
        ("noise", noise(1, 3, 32, 48)),
        ("half", torch.cat([noise(1, 3, 32, 24), torch.ones(1, 3, 32, 24)], -1)),
    ):
        out = predict(model, name, x)
        location = ailurus_status(model).locations[0]
        kept[kind] = location.num_clusters
        assert out.isfinite().all() and location.num_tokens == CASES[name].num_tokens and 0 < location.flops_saved < 1
    assert kept["flat"] == 24 and kept["noise"] == 72 and 40 <= kept["half"] <= 54


def test_a_stage_of_segformer_too():
    model = apply_ailurus(make_segformer(), cluster_location=0, keep_ratio=0.75, min_keep_ratio=0.25)
    kept = []
    for x in (torch.zeros(1, 3, 96, 160), noise(1, 3, 96, 160)):
        with torch.no_grad():
            model(x)
        kept.append(ailurus_status(model).locations[0].num_clusters)
    assert 15 <= kept[0] < kept[1] <= 45  # the grid's border is not flat


def test_one_image_at_a_time_and_no_compiled_graphs():
    model = apply_ailurus(make_model(NAME), **RANGE)
    with pytest.raises(AiluRusError, match="2 images in one tensor"):
        predict(model, NAME, images(2))
    predict(model, NAME, images(1))
    with pytest.raises(Exception, match="depend on the image"):
        predict(torch.compile(model, fullgraph=True, backend="eager"), NAME, images(1))
    with pytest.raises(Exception, match="depend on the image"):
        torch.export.export(model, (images(1),), {"interpolate_pos_encoding": True})


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_clusters": 9, "min_keep_ratio": 0.2}, "needs one keep_ratio"),
        ({"cluster_location": (1, 2), "keep_ratio": (0.5, 0.2), "min_keep_ratio": 0.1}, r"got \(0.5, 0.2\)"),
        ({"keep_ratio": 0.5, "min_keep_ratio": 0.5}, "below keep_ratio.*got 0.5 and 0.5"),
        ({"keep_ratio": 1.0, "min_keep_ratio": 0.5}, "got 0.5 and 1.0"),
        ({"keep_ratio": 0.5, "min_keep_ratio": 0.0}, "above 0.*got 0.0"),
    ],
)
def test_bounds_are_checked(fields, message):
    with pytest.raises(AiluRusError, match=message):
        AiluRusConfig(**fields)


def test_off_by_default_and_saved_with_the_settings():
    assert AiluRusConfig(keep_ratio=0.5).min_keep_ratio is None
    config = AiluRusConfig(**RANGE)
    assert AiluRusConfig.from_dict(config.to_dict()) == config
