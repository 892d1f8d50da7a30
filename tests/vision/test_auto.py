"""AiluRusModelFor…: what transformers' Auto classes load, dispatch and take, with AiluRus on; and in its pipelines."""

import numpy as np
import pytest
import torch
import transformers as hf
from models import images, images_for, make_model, predict
from PIL import Image

import ailurus_hf
from ailurus_hf import AiluRusConfig, AiluRusError, UnsupportedModelError, ailurus_status, apply_ailurus
from ailurus_hf.vision.backend import layers_of
from ailurus_hf.vision.discovery import find_encoders

SETTINGS = {"cluster_location": 1, "keep_ratio": 0.25}
WRAPPERS = {
    "AiluRusModel": "DINOv3ViTModel",
    "AiluRusModelForImageClassification": "ViTForImageClassification",
    "AiluRusModelForSemanticSegmentation": "Segmenter(ViT, mask transformer)",
    "AiluRusModelForObjectDetection": "YOLOS",
    "AiluRusModelForDepthEstimation": "DepthAnything",
}


@pytest.fixture(params=WRAPPERS.items(), ids=WRAPPERS)
def saved(request, tmp_path):
    """The wrapper, the name of the case, a folder with the plain model, and what it predicts when reduced."""
    wrapper, name = request.param
    model = make_model(name)
    model.save_pretrained(tmp_path)
    return getattr(ailurus_hf, wrapper), name, tmp_path, predict(apply_ailurus(model, **SETTINGS), name, images())


def test_a_plain_folder_loads_with_settings_given(saved):
    wrapper, name, folder, expected = saved
    model = wrapper.from_pretrained(folder, ailurus_config=SETTINGS).eval()
    assert type(model) is type(make_model(name)) and ailurus_status(model).active
    assert torch.equal(predict(model, name, images()), expected)


def test_settings_come_back_with_the_folder(saved, tmp_path):
    wrapper, name, folder, expected = saved
    wrapper.from_pretrained(folder, ailurus_config=SETTINGS).save_pretrained(tmp_path / "again")
    model = wrapper.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(predict(model, name, images()), expected)


def test_arguments_of_transformers_pass_through(saved):
    wrapper, name, folder, _ = saved
    model, report = wrapper.from_pretrained(
        folder,
        ailurus_config=SETTINGS,
        dtype=torch.bfloat16,
        device_map="cpu",
        output_loading_info=True,
    )
    assert model.dtype == torch.bfloat16 and not report["missing_keys"]
    assert predict(model.eval(), name, images().bfloat16()).isfinite().all()


def test_quantized_weights_load(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    name = "ViTForImageClassification"
    make_model(name).save_pretrained(tmp_path)
    given = {"quantization_config": hf.TorchAoConfig(quantization.Int8WeightOnlyConfig())}
    plain = hf.AutoModelForImageClassification.from_pretrained(tmp_path, **given).eval()
    model = ailurus_hf.AiluRusModelForImageClassification.from_pretrained(tmp_path, ailurus_config=SETTINGS, **given)
    assert type(model.vit.layers[0].attention.q_proj.weight) is not torch.nn.Parameter
    reduced = predict(model.eval(), name, images())
    assert not torch.allclose(reduced, predict(plain, name, images()))
    assert torch.equal(reduced, predict(apply_ailurus(plain, **SETTINGS), name, images()))


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_of_bitsandbytes_load(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    # It packs 4 bits in blocks of 64 numbers, also those of the classifier.
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_labels": 64}
    torch.manual_seed(0)
    hf.ViTForImageClassification(
        hf.ViTConfig(**sizes, num_attention_heads=4, image_size=32, patch_size=4)
    ).save_pretrained(tmp_path)
    given = {"quantization_config": hf.BitsAndBytesConfig(**{f"load_in_{bits}bit": True}), "device_map": "cpu"}
    plain = hf.AutoModelForImageClassification.from_pretrained(tmp_path, **given).eval()
    model = ailurus_hf.AiluRusModelForImageClassification.from_pretrained(tmp_path, ailurus_config=SETTINGS, **given)
    assert type(model.vit.layers[0].attention.q_proj).__name__ == {8: "Linear8bitLt", 4: "Linear4bit"}[bits]
    x = images(grid=(8, 8))
    with torch.no_grad():
        reduced = model.eval()(x).logits
        assert not torch.allclose(reduced, plain(x).logits)
        assert torch.equal(reduced, apply_ailurus(plain, **SETTINGS)(x).logits)


# Single parameters are named as well, which accelerate takes for a mistake.
@pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules")
@pytest.mark.parametrize("name", ["ViTModel", "BeitModel", "Segmenter(ViT, mask transformer)"])
def test_weights_that_a_device_map_keeps_on_disk(name, tmp_path):
    model = make_model(name)
    model.save_pretrained(tmp_path)
    expected = predict(apply_ailurus(model, **SETTINGS), name, images())
    # The last layer on disk, all else in memory.
    last = next(n for n, m in model.named_modules() if m is layers_of(find_encoders(model)[0].encoder)[1][-1])
    names = [n for n, _ in [*model.named_parameters(), *model.named_buffers()] if not n.startswith(f"{last}.")]
    device_map = {**dict.fromkeys(names, "cpu"), last: "disk"}
    auto = ailurus_hf.AiluRusModel if "Segmenter" not in name else ailurus_hf.AiluRusModelForSemanticSegmentation
    loaded = auto.from_pretrained(
        tmp_path, ailurus_config=SETTINGS, device_map=device_map, offload_folder=tmp_path / "offload"
    ).eval()
    assert {str(p.device) for p in loaded.parameters()} == {"cpu", "meta"}
    assert torch.equal(predict(loaded, name, images()), expected)


def test_without_settings_anywhere_it_says_what_to_give(saved):
    wrapper, _, folder, _ = saved
    with pytest.raises(AiluRusError, match="ailurus_config=AiluRusConfig"):
        wrapper.from_pretrained(folder)


@pytest.mark.parametrize(
    "wrong, message",
    [({"keep_ratio": 0.5, "cluster_loc": 4}, "cluster_loc'; the fields are cluster_location"), (0.5, "got float")],
)
def test_wrong_settings_are_named(wrong, message, tmp_path):
    make_model("ViTModel").save_pretrained(tmp_path)
    with pytest.raises(AiluRusError, match=message):
        ailurus_hf.AiluRusModel.from_pretrained(tmp_path, ailurus_config=wrong)


def test_a_model_that_no_wrapper_loads_takes_its_saved_settings(tmp_path):
    name = "EoMT"
    model = apply_ailurus(make_model(name), **SETTINGS)
    expected = predict(model, name, images_for(name))
    model.save_pretrained(tmp_path)
    loaded = apply_ailurus(hf.AutoModelForUniversalSegmentation.from_pretrained(tmp_path)).eval()
    assert ailurus_status(loaded).config == AiluRusConfig(**SETTINGS).to_dict()
    assert torch.equal(predict(loaded, name, images_for(name)), expected)
    # Where none were saved, it takes a preset by task.
    assert ailurus_status(apply_ailurus(make_model(name))).config == AiluRusConfig.preset("dense").to_dict()


def test_a_model_that_cannot_be_reduced_is_refused_with_the_reason(tmp_path):
    config = hf.SwinConfig(image_size=32, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4)
    hf.SwinForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="SwinForImageClassification is refused because it halves its grid"):
        ailurus_hf.AiluRusModelForImageClassification.from_pretrained(tmp_path, ailurus_config=SETTINGS)


def photograph():
    pixels = np.random.default_rng(0).integers(0, 255, (24, 36, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((48, 32))


def areas(out):
    """The pixels of each class, of five."""
    found = {entry["label"]: int(np.count_nonzero(entry["mask"])) for entry in out}
    return [found.get(f"LABEL_{number}", 0) for number in range(5)]


PROCESSOR = {"do_resize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
PIPELINES = {
    "image-classification": (
        "ViTForImageClassification",
        lambda: hf.ViTImageProcessorPil(do_resize=True, size={"height": 32, "width": 32}),
        lambda out: [entry["score"] for entry in out],
    ),
    "image-feature-extraction": (
        "ViTModel",
        lambda: hf.ViTImageProcessorPil(do_resize=True, size={"height": 32, "width": 32}),
        lambda out: np.array(out),
    ),
    "depth-estimation": (
        "DepthAnything",
        lambda: hf.DPTImageProcessorPil(**PROCESSOR),
        lambda out: out["predicted_depth"].numpy(),
    ),
    "image-segmentation": (
        "UperNet over DINOv2",
        lambda: hf.DPTImageProcessorPil(**PROCESSOR),
        areas,
    ),
    "semantic segmentation": (
        "Segmenter(ViT, mask transformer)",
        lambda: ailurus_hf.SegmenterImageProcessor(),
        areas,
    ),
    "object-detection": (
        "YOLOS",
        lambda: hf.YolosImageProcessorPil(**PROCESSOR, do_pad=False),
        lambda out: [entry["score"] for entry in out],
    ),
}


@pytest.mark.parametrize("task", PIPELINES)
def test_it_works_in_a_pipeline(task):
    name, processor, numbers = PIPELINES[task]
    model = make_model(name)
    arguments = {"threshold": 0.0} if task == "object-detection" else {}
    task = "image-segmentation" if "segmentation" in task else task
    run = hf.pipeline(task, model=model, image_processor=processor())
    before = numbers(run(photograph(), **arguments))
    apply_ailurus(model, **SETTINGS)
    after = numbers(run(photograph(), **arguments))
    assert np.shape(after) == np.shape(before) and not np.allclose(after, before)
    assert ailurus_status(model).locations[0].forwards == 1
