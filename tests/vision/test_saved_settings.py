"""Settings travel with the model: written and cleared where save_pretrained and apply_ailurus(loaded) look for them."""

import copy
import json

import pytest
import torch
import transformers as hf
from models import CASES, images, make_model, predict
from torch import nn

from ailurus_hf import ailurus_status, apply_ailurus, remove_ailurus

SETTINGS = {"cluster_location": 1, "keep_ratio": 0.25}
VIT = "ViTForImageClassification"


def saved(model, folder):
    """The settings in config.json, at the top or in the vision tower's part."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    return config.get("ailurus_config"), config.get("vision_config", {}).get("ailurus_config")


def test_removed_from_a_tower_they_are_gone_from_the_model(tmp_path):
    model = apply_ailurus(make_model("CLIPModel"), **SETTINGS)
    assert all(found["keep_ratio"] == 0.25 for found in saved(model, tmp_path))
    remove_ailurus(model.vision_model)
    assert not ailurus_status(model).active and saved(model, tmp_path) == (None, None)


def test_applied_to_a_tower_the_loaded_model_finds_them(tmp_path):
    model, x = make_model("CLIPModel"), images()
    apply_ailurus(model.vision_model, **SETTINGS)
    reduced = predict(model, "CLIPModel", x)
    assert saved(model, tmp_path)[1]["keep_ratio"] == 0.25
    loaded = apply_ailurus(hf.CLIPModel.from_pretrained(tmp_path).eval())
    torch.testing.assert_close(predict(loaded, "CLIPModel", x), reduced)
    assert saved(remove_ailurus(loaded), tmp_path) == (None, None)


def adapted(model):
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "query"]))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, for what peft asks
@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager"), adapted])
def test_a_wrapper_writes_them_into_the_model_that_it_wraps(wrap, tmp_path):
    model = make_model(VIT)
    wrapped = apply_ailurus(wrap(model), **SETTINGS)
    inner = next(module for module in wrapped.modules() if type(module) is type(model))
    assert ailurus_status(inner).active and inner.config.ailurus_config["keep_ratio"] == 0.25
    remove_ailurus(wrapped)
    assert not ailurus_status(inner).active and not hasattr(inner.config, "ailurus_config")


def test_a_copied_config_carries_settings_and_not_what_is_on(tmp_path):
    teacher = apply_ailurus(make_model(VIT), **SETTINGS)
    student = hf.ViTForImageClassification(copy.deepcopy(teacher.config)).eval()
    assert not ailurus_status(student).active
    assert student.config._attn_implementation == make_model(VIT).config._attn_implementation
    assert ailurus_status(apply_ailurus(student)).config["keep_ratio"] == 0.25
    assert saved(remove_ailurus(student), tmp_path)[0] is None
    assert teacher.config.ailurus_config["keep_ratio"] == 0.25
    untouched = hf.ViTForImageClassification(copy.deepcopy(teacher.config))
    assert saved(remove_ailurus(untouched), tmp_path)[0] is None


def test_a_copy_of_the_model_has_its_own():
    model = apply_ailurus(make_model(VIT), **SETTINGS)
    twin = remove_ailurus(copy.deepcopy(model))
    assert not hasattr(twin.config, "ailurus_config") and hasattr(model.config, "ailurus_config")
    assert CASES[VIT].num_tokens == 96 and ailurus_status(model).active


def test_status_says_that_saved_settings_are_off(tmp_path):
    apply_ailurus(make_model("ViTModel"), cluster_location=1, keep_ratio=0.5).save_pretrained(tmp_path)
    loaded = hf.AutoModel.from_pretrained(tmp_path)
    off = "ViTModel: AiluRus is off"
    assert str(ailurus_status(loaded)) == f"{off}; it was saved with settings: apply_ailurus(model) switches them on"
    assert ailurus_status(apply_ailurus(loaded)).active
    assert str(ailurus_status(remove_ailurus(loaded))) == off
    # Settings of another version, or wrong ones, are no reason not to say what is on.
    loaded.config.ailurus_config = {"keep_ratio": 7}
    assert ailurus_status(loaded).settings_are_off
