"""Detectors on a plain ViT: four maps of one encoder, the same on and off, trained and scored on a made-up COCO."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision_ops
import transformers as hf
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from ailurus_hf import (
    AiluRusError,
    SegmenterConfig,
    SegmenterForSemanticSegmentation,
    ailurus_status,
    apply_ailurus,
    remove_ailurus,
)
from ailurus_hf.detection.pyramid import ViTPyramid
from ailurus_hf.vision.backend import layers_of

ROOT = Path(__file__).parents[2]
DEPTH, WIDTH, PATCH = 4, 32, 8
SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": PATCH,
}
BEIT = {
    "use_absolute_position_embeddings": True,  # as CAE has both
    "use_relative_position_bias": True,
    "layer_scale_init_value": 1.0,
}
ENCODERS = {
    "ViT": lambda **f: hf.ViTModel(hf.ViTConfig(**SIZES, intermediate_size=64, **f), add_pooling_layer=False),
    "BEiT": lambda **f: hf.BeitModel(
        hf.BeitConfig(**SIZES, intermediate_size=64, **BEIT, **f), add_pooling_layer=False
    ),
    "DINOv2": lambda **f: hf.Dinov2Model(hf.Dinov2Config(**SIZES, mlp_ratio=2, layerscale_value=1.0, **f)),
}
TAPS = {"four taps": None, "four other taps": (1, 2, 2, 3), "the last alone": (DEPTH,)}
GRID = (6, 10)
REDUCED = {"cluster_location": 1, "keep_ratio": 0.25}
# Proposals are many, and are of no interest here.
FEW = {f"rpn_{when}_nms_top_n_{mode}": 12 for when in ("pre", "post") for mode in ("train", "test")}
FEW |= {"box_batch_size_per_image": 8, "box_detections_per_img": 8, "box_score_thresh": 0.0}


def encoder(name, **fields):
    torch.manual_seed(0)
    made = ENCODERS[name](**fields).eval()
    with torch.no_grad():
        for parameter_name, parameter in made.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
            if parameter_name.endswith(("q_proj.weight", "k_proj.weight", "query.weight", "key.weight")):
                parameter.mul_(3)
    return made


def pyramid(name="ViT", taps=None):
    return ViTPyramid(encoder(name), taps).eval()


def images(batch=2, grid=GRID, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, grid[0] * PATCH, grid[1] * PATCH, generator=generator)


def blocky(batch=2, seed=0):
    """Every 2 x 2 patches are equal."""
    patches = torch.randn(batch, 3, 3, 5, PATCH, PATCH, generator=torch.Generator().manual_seed(seed))
    tiled = patches.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return tiled.permute(0, 1, 2, 4, 3, 5).reshape(batch, 3, GRID[0] * PATCH, GRID[1] * PATCH)


@torch.no_grad()
def maps_of(module, x):
    return list(module(x).values())


each_encoder = pytest.mark.parametrize("name", ENCODERS)
each_way = pytest.mark.parametrize("taps", TAPS.values(), ids=TAPS)


@each_encoder
@each_way
def test_maps_are_of_four_sizes(name, taps):
    made = pyramid(name, taps)
    for grid in (GRID, (3, 5), (1, 2)):
        rows, columns = grid
        maps = maps_of(made, images(grid=grid))
        assert [m.shape[2:] for m in maps] == [
            (4 * rows, 4 * columns),
            (2 * rows, 2 * columns),
            (rows, columns),
            (-(-rows // 2), -(-columns // 2)),
        ]
        assert [m.shape[1] for m in maps] == made.widths
    assert made.taps == (taps or (1, 2, 3, 4))


@each_way
def test_maps_are_the_layers_that_are_read(taps):
    made, x = pyramid("ViT", taps), images()
    seen = []
    for layer in made.encoder.layers:
        layer.register_forward_hook(lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    third = maps_of(made, x)[2]
    tap = made.taps[2 if len(made.taps) == 4 else 0]
    assert torch.equal(third.flatten(2).transpose(1, 2), seen[tap - 1][:, 1:])


@each_encoder
@each_way
@pytest.mark.parametrize("fields", [{}, {"restore": "copy"}, {"cluster_location": (1, 2), "keep_ratio": (0.5, 0.25)}])
def test_reduced_maps_change_and_come_back(name, taps, fields):
    made, x = pyramid(name, taps), images()
    plain = maps_of(made, x)
    lengths = []
    apply_ailurus(made, **{**REDUCED, **fields})
    layers_of(made.encoder)[1][2].mlp.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    reduced = maps_of(made, x)
    assert lengths == [15 + 1]
    assert [m.shape for m in reduced] == [m.shape for m in plain]
    location = ailurus_status(made).locations[-1]
    assert (location.num_tokens or 0) > location.num_clusters == 15
    for number, (a, b) in enumerate(zip(plain, reduced, strict=True)):
        tap = made.taps[number if len(made.taps) == 4 else 0]
        assert torch.equal(a, b) == (tap <= 1), f"map {number} of layer {tap}"
    remove_ailurus(made)
    assert all(torch.equal(a, b) for a, b in zip(maps_of(made, x), plain, strict=True))


@each_encoder
@each_way
def test_maps_equal_the_plain_ones_on_duplicated_tokens(name, taps):
    made, x = pyramid(name, taps), blocky()
    with torch.no_grad():
        for parameter_name, parameter in made.encoder.named_parameters():
            if parameter_name.endswith("position_embeddings"):
                parameter.zero_()
            if parameter_name.endswith("relative_position_bias_table"):
                parameter[:-3] = parameter[:1]
    plain = maps_of(made, x)
    apply_ailurus(made, **REDUCED)
    for got, want in zip(maps_of(made, x), plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


def test_only_what_is_read_is_unmerged(monkeypatch):
    from ailurus_hf.vision.forward_state import Reduction

    unmerged = []
    unmerge = Reduction.unmerge
    monkeypatch.setattr(Reduction, "unmerge", lambda *args: (unmerged.append(1), unmerge(*args))[1])
    for taps, times in (((2, 2, 3, 4), 3), ((DEPTH,), 1)):
        maps_of(apply_ailurus(pyramid("ViT", taps), **REDUCED), images())
        assert len(unmerged) == times
        unmerged.clear()


@pytest.mark.parametrize("taps", [(), (1, 2), (0, 1, 2, 3), (1, 2, 3, DEPTH + 1)])
def test_wrong_taps_are_named(taps):
    with pytest.raises(AiluRusError, match=f"one or four layers of 1 to {DEPTH}, got"):
        ViTPyramid(encoder("ViT"), taps)


def test_patches_that_heads_would_misread_are_refused():
    fields = {**SIZES, "patch_size": 14, "image_size": 56}
    with pytest.raises(AiluRusError, match="got 14"):
        ViTPyramid(hf.Dinov2Model(hf.Dinov2Config(**fields)))


# With torchvision.


@pytest.fixture(scope="module")
def mask_rcnn():
    with torchvision_ops.in_reach() as found:
        if not found:
            pytest.skip("torchvision is not installed: pip install 'ailurus-hf[detection]'")
        from ailurus_hf.detection.detector import mask_rcnn

        yield mask_rcnn


def photographs():
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, *size, generator=generator) for size in ((50, 70), (64, 41))]


def targets_for(pictures):
    made = []
    for picture in pictures:
        mask = torch.zeros(1, *picture.shape[1:], dtype=torch.uint8)
        mask[:, 5:40, 8:30] = 1
        made.append({"boxes": torch.tensor([[8.0, 5.0, 30.0, 40.0]]), "labels": torch.tensor([2]), "masks": mask})
    return made


@pytest.mark.parametrize("name", ["ViT", "BEiT"])
@pytest.mark.parametrize("taps", [None, (DEPTH,)])
def test_detector_on_and_off(mask_rcnn, name, taps):
    detector = mask_rcnn(encoder(name), 4, taps, min_size=64, max_size=96, **FEW).eval()
    pictures = photographs()
    with torch.no_grad():
        plain = detector(pictures)
        apply_ailurus(detector, **REDUCED)
        reduced = detector(pictures)
        # 64 x 90 and 96 x 61 pixels, padded to common whole patches.
        (location,) = ailurus_status(detector).locations
        assert (location.num_tokens, location.num_clusters) == (12 * 12, 36) and location.flops_saved > 0.3
        remove_ailurus(detector)
        again = detector(pictures)
    for picture, before, between, after in zip(pictures, plain, reduced, again, strict=True):
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert before["masks"].shape[2:] == between["masks"].shape[2:] == picture.shape[1:]
        assert not torch.equal(before["scores"], between["scores"])


@pytest.mark.parametrize("taps", [None, (DEPTH,)])
def test_detector_trains_while_reduced(mask_rcnn, taps):
    detector = apply_ailurus(mask_rcnn(encoder("BEiT"), 4, taps, min_size=64, max_size=96, **FEW), **REDUCED).train()
    torch.manual_seed(0)
    losses = detector(photographs(), targets_for(photographs()))
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    sum(losses.values()).backward()
    without = [
        name
        for name, parameter in detector.named_parameters()
        if parameter.grad is None or not parameter.grad.isfinite().all()
    ]
    # What the pyramid does not read of an encoder, and the map that is left out where the last is not read.
    assert all("encoder.layernorm" in name for name in without), without


@pytest.mark.usefixtures("mask_rcnn")
def test_faster_rcnn_is_the_same_without_masks():
    from ailurus_hf.detection import faster_rcnn

    detector = faster_rcnn(encoder("ViT"), 4, out_channels=16, min_size=64, max_size=96, **FEW).eval()
    assert detector.backbone.out_channels == 16
    pictures = photographs()
    with torch.no_grad():
        plain = detector(pictures)
        apply_ailurus(detector, **REDUCED)
        reduced = detector(pictures)
        remove_ailurus(detector)
        again = detector(pictures)
    for before, between, after in zip(plain, reduced, again, strict=True):
        assert set(before) == {"boxes", "labels", "scores"}
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert not torch.equal(before["scores"], between["scores"])
    boxes_alone = [{key: target[key] for key in ("boxes", "labels")} for target in targets_for(pictures)]
    assert set(detector.train()(pictures, boxes_alone)) == {
        f"loss_{name}" for name in ("classifier", "box_reg", "objectness", "rpn_box_reg")
    }


def test_without_torchvision_the_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "ailurus_hf.detection.detector", raising=False)
    monkeypatch.setitem(sys.modules, "torchvision.models.detection", None)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match=r"ailurus-hf\[detection\]"):
        import ailurus_hf.detection.detector  # noqa: F401


# The training script, on a made-up COCO.


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    (folder / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (folder / split).mkdir()
        about = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "red"}, {"id": 3, "name": "blue"}]}
        for number in range(3):
            width, height = 80 + 8 * number, 64
            picture = np.full((height, width, 3), 128, dtype=np.uint8)
            about["images"].append({"id": 7 + number, "file_name": f"{number}.jpg", "width": width, "height": height})
            for k, category in enumerate((1, 3)[:number]):  # none in the first picture
                x, y, w, h = 10 + 30 * k, 12, 24, 30
                picture[y : y + h, x : x + w] = (255, 0, 0) if category == 1 else (0, 0, 255)
                about["annotations"].append(
                    {
                        "id": 10 * number + k + 1,
                        "image_id": 7 + number,
                        "category_id": category,
                        "bbox": [x, y, w, h],
                        "area": w * h,
                        "iscrowd": 0,
                        "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                    }
                )
            Image.fromarray(picture).save(folder / split / f"{number}.jpg")
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(about))
    return folder


@pytest.fixture
def script(mask_rcnn, monkeypatch):
    pytest.importorskip("pycocotools")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import train_detector

    def run(*args):
        AcceleratorState._reset_state(reset_partial_state=True)  # as in a process of its own
        monkeypatch.setattr(sys, "argv", ["train_detector.py", *map(str, args)])
        train_detector.main()

    return run


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")  # of pycocotools
def test_training_script_trains_goes_on_and_scores(script, coco, tmp_path):
    encoder("BEiT").config.save_pretrained(tmp_path / "encoder")
    output = tmp_path / "run"
    fields = json.dumps({"min_size": 64, "max_size": 96, **FEW})
    small = ["--data", coco, "--output", output, "--fields", fields, "--workers", 0, "--warmup", 1]
    script(*small, "--encoder", tmp_path / "encoder", "--from-config", "--batch-size", 1, "--epochs", 1)
    assert json.loads((output / "progress.json").read_text())["epochs"] == 1
    trained = torch.load(output / "state/optimizer.bin", weights_only=True)["state"][0]["step"].item()
    assert trained == 2  # two of three pictures have annotations
    script(*small, "--resume", "--batch-size", 1, "--epochs", 2, "--reduce", 1, 24)
    assert torch.load(output / "state/optimizer.bin", weights_only=True)["state"][0]["step"].item() == 4
    script(*small, "--evaluate", "1,24")
    plain, row = json.loads((output / "evaluation.json").read_text())
    assert plain["setting"] == "plain" and row["setting"] == "1,24"
    assert all(0 <= each["box_ap"] <= 100 and each["ms"] > 0 for each in (plain, row))


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")  # of pycocotools
def test_training_script_without_masks_from_a_segmenter(script, coco, tmp_path):
    for split in ("train2017", "val2017"):
        (tmp_path / split).symlink_to(coco / split)
        about = json.loads((coco / f"annotations/instances_{split}.json").read_text())
        about["annotations"] = [{**each, "segmentation": []} for each in about["annotations"]]
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / f"annotations/instances_{split}.json").write_text(json.dumps(about))
    sizes = {"model_type": "vit", **SIZES, "intermediate_size": 64, "image_size": [48, 72]}
    segmenter = SegmenterForSemanticSegmentation(SegmenterConfig(encoder_config=sizes, num_labels=5))
    segmenter.save_pretrained(tmp_path / "segmenter")
    output = tmp_path / "run"
    fields = json.dumps({"min_size": 64, "max_size": 96, **FEW})
    small = ["--data", tmp_path, "--output", output, "--workers", 0, "--warmup", 1, "--lr", 1e-12]
    start = ["--encoder", tmp_path / "segmenter", "--fields", fields, "--channels", 16, "--taps", 1, 2, 2, 4]
    script(*small, *start, "--precision", "bf16", "--flip-vertically", "--epochs", 1)
    # With so small a step the weights are still the Segmenter's, its positions resized to a square.
    trained, before = load_file(output / "state/model.safetensors"), segmenter.encoder.state_dict()
    kept = {name: trained[f"backbone.pyramid.encoder.{name}"] for name in before}
    assert kept.pop("embeddings.position_embeddings").shape == (1, 1 + 6 * 6, WIDTH)
    for name, weight in kept.items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=1e-6)
    about = json.loads((output / "detector.json").read_text())
    assert about["num_classes"] == 4 and not about["masks"] and about["taps"] == [1, 2, 2, 4]
    minutes = json.loads((output / "progress.json").read_text())["minutes"]
    # What it is made of need not be said again.
    script(*small, "--resume", "--epochs", 2)
    assert json.loads((output / "progress.json").read_text())["minutes"] > minutes > 0
    script(*small, "--evaluate", "1,24")
    plain, row = json.loads((output / "evaluation.json").read_text())
    assert "mask_ap" not in plain and 0 <= row["box_ap"] <= row["box_ap50"] <= 100
