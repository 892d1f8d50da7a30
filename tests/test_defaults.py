"""apply_ailurus with nothing set, keyword arguments that editors know, and a status that notebooks show."""

import dataclasses
import logging

import pytest
import torch
from models import CASES, images_for, make_model

from ailurus_hf import AiluRusConfig, AiluRusDiffusionConfig, ailurus_status, apply_ailurus, remove_ailurus
from ailurus_hf.fields import AiluRusDiffusionFields, AiluRusFields


@pytest.mark.parametrize(
    ("name", "expected", "told"),
    [
        ("ViTForImageClassification", AiluRusConfig.preset("classification"), "preset 'classification'"),
        ("BeitForSemanticSegmentation", AiluRusConfig.preset("dense"), "preset 'dense'"),
        ("EoMT", AiluRusConfig.preset("dense"), "preset 'dense'"),
        ("ViTModel", AiluRusConfig(cluster_location=2, keep_ratio=0.5), "no preset is for it"),
        ("DepthAnything", AiluRusConfig(cluster_location=2, keep_ratio=0.5), "no preset is for it"),
    ],
)
def test_nothing_set_takes_a_preset_by_task(
    name: str, expected: AiluRusConfig, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(name)
    with caplog.at_level(logging.INFO, "ailurus_hf"):
        assert apply_ailurus(model) is model
    assert any(told in record.getMessage() for record in caplog.records)
    assert ailurus_status(model).config == expected.to_dict()
    with torch.no_grad():
        model(images_for(name), **({"interpolate_pos_encoding": True} if name.startswith("ViT") else {}))
    first = ailurus_status(model).locations[0]
    assert first.num_tokens > first.num_clusters
    assert not ailurus_status(remove_ailurus(model)).active


@pytest.mark.parametrize(
    ("config", "fields"), [(AiluRusConfig, AiluRusFields), (AiluRusDiffusionConfig, AiluRusDiffusionFields)]
)
def test_typed_fields_are_those_of_the_config(config: type, fields: type) -> None:
    own = {field.name: field.type for field in dataclasses.fields(config)}
    typed = {name: getattr(kind, "__forward_arg__", kind) for name, kind in fields.__annotations__.items()}
    assert {name: kind.replace("ClusteringName | ", "") for name, kind in typed.items()} == own


def test_a_notebook_shows_the_table_and_no_tensors() -> None:
    model = apply_ailurus(make_model("ViTModel"), cluster_location=2, keep_ratio=0.5)
    case = CASES["ViTModel"]
    with torch.no_grad():
        model(images_for("ViTModel"), interpolate_pos_encoding=True)
    status = ailurus_status(model)
    assert status.last_clusters is not None
    html = status._repr_html_()
    assert "<th>tokens</th>" in html and f"<td>{case.num_tokens} → {case.num_tokens // 2}</td>" in html
    assert "tensor" not in html and "tensor" not in repr(status) and repr(status) == str(status)
    assert ailurus_status(remove_ailurus(model))._repr_html_() == "<p>ViTModel: AiluRus is off</p>"
