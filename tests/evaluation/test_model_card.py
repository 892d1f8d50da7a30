"""A tuned model as a folder and on the Hub: its card says what was measured, and the code in it runs."""

import re
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers as hf
from diffusers import StableDiffusionPipeline
from diffusion_models import make_pipeline
from huggingface_hub import ModelCard
from models import make_model

from ailurus_hf import AiluRusConfig, AiluRusDiffusionConfig, SegmenterImageProcessor, ailurus_status
from ailurus_hf.evaluation.timing import measured_on
from ailurus_hf.evaluation.tuned import Tuned, TunedRow

PROCESSORS = {
    "Segmenter(ViT, mask transformer)": SegmenterImageProcessor,
    "ViTForImageClassification": hf.ViTImageProcessor,
}


def tuned_with(*configs, note=""):
    rows = [
        TunedRow(config, f"setting {i}", 10.0, 2.0 + i, 1.9 + i, 2.1 + i, 0.01, 0.005, 0.02, 8)
        for i, config in enumerate(configs)
    ]
    about = measured_on(torch.device("cpu"), "float32")
    return Tuned(rows, len(rows) - 1, {"max_loss": 0.02}, True, True, note, "other labels", 9, measured_on=about)


def run_code(card: str, **missing: None) -> dict:
    """The names that the card's Python leaves, up to where it switches off; parts that the tiny target has not."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    assert "remove_ailurus(" in code
    names: dict = {}
    code = code.rsplit("\n", 2)[0]
    if missing:
        code = code.replace('")', '", ' + ", ".join(f"{name}=None" for name in missing) + ")")
    exec(code, names)
    return names


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_saved_model_has_a_card_whose_code_runs(name: str, tmp_path: Path) -> None:
    model, folder = make_model(name), tmp_path / "reduced"
    model.config._name_or_path = "somebody/their-model"
    config = AiluRusConfig(cluster_location=1, keep_ratio=0.4)
    tuned = tuned_with(AiluRusConfig(cluster_location=1, keep_ratio=0.8), config, note="The choice may be chance.")
    tuned.save_pretrained(model, folder, processor=PROCESSORS[name]())
    card = ModelCard.load(folder / "README.md")
    task = "image-segmentation" if name.startswith("Segmenter") else "image-classification"
    assert card.data.library_name == "ailurus_hf" and card.data.pipeline_tag == task
    assert card.data.base_model == "somebody/their-model" and "token-reduction" in card.data.tags
    for told in ("3.00× as fast", "2.90 to 3.10", "loss 0.0100 (0.0050 to 0.0200)", "on 8 inputs", "other labels"):
        assert told in card.content
    assert tuned.table() in card.content and tuned.note in card.content
    assert f"torch {torch.__version__}" in card.content and f"{torch.get_num_threads()} threads" in card.content
    loaded = run_code(card.content)["model"]
    assert ailurus_status(loaded).config == config.to_dict()
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # Not to the bit: loaded weights lie elsewhere in memory, and a product may be rounded in another order.
        torch.testing.assert_close(loaded(x).logits, model(x).logits, rtol=0, atol=1e-6)
    assert Tuned.load(folder / "tuned.json").best == config


def test_a_saved_pipeline_has_a_card_whose_code_runs(tmp_path: Path) -> None:
    pipe, config = make_pipeline(StableDiffusionPipeline), AiluRusDiffusionConfig(keep_ratio=0.5, min_tokens=12)
    tuned_with(config).save_pretrained(pipe, tmp_path / "pipe", base_model="somebody/their-pipeline")
    card = ModelCard.load(tmp_path / "pipe" / "README.md")
    assert card.data.base_model == "somebody/their-pipeline" and card.data.library_name == "ailurus_hf"
    parts = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    loaded = run_code(card.content, **dict.fromkeys(parts))["pipe"]
    assert ailurus_status(loaded).active and ailurus_status(loaded).config == ailurus_status(pipe).config


def test_it_is_pushed_to_the_hub_as_it_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict = {}

    class Hub:
        def __init__(self, token: str | None = None) -> None:
            calls["token"] = token

        def create_repo(self, repo_id: str, **options: object) -> object:
            calls["made"] = repo_id, options
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
            files = {path.name for path in Path(folder_path).iterdir()}
            calls["sent"] = SimpleNamespace(to=repo_id, files=files, card=(Path(folder_path) / "README.md").read_text())

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    tuned = tuned_with(AiluRusConfig(cluster_location=1, keep_ratio=0.4))
    address = tuned.push_to_hub(
        make_model("Segmenter(ViT, mask transformer)"), "me/reduced", private=True, token="secret"
    )
    assert address == "https://huggingface.co/me/reduced"
    assert calls["token"] == "secret" and calls["made"] == ("me/reduced", {"private": True, "exist_ok": True})
    assert (
        calls["sent"].to == "me/reduced"
        and {"config.json", "model.safetensors", "README.md", "tuned.json"} <= calls["sent"].files
    )
    assert 'from_pretrained("me/reduced")' in calls["sent"].card and "secret" not in calls["sent"].card


def test_a_folder_is_no_base_model(tmp_path: Path) -> None:
    model = make_model("Segmenter(ViT, mask transformer)")
    model.save_pretrained(tmp_path / "mine")
    model = type(model).from_pretrained(tmp_path / "mine")
    tuned_with(AiluRusConfig(cluster_location=1, keep_ratio=0.4)).save_pretrained(model, tmp_path / "reduced")
    card = ModelCard.load(tmp_path / "reduced" / "README.md")
    assert card.data.base_model is None and str(tmp_path / "mine") not in card.content
