"""The native Segmenter against a plain restatement of the original, on the same weights read by the converter."""

import pytest
import torch
from original_segmenter import CLASSES, make_variant, make_weights, original_segmenter, save_checkpoint

from ailurus_hf.segmenter import SegmenterForSemanticSegmentation, SegmenterImageProcessor
from ailurus_hf.segmenter.convert import convert_segmenter_checkpoint

# --------------------------------------------------------------------------------------------------------- equality


@pytest.mark.parametrize("decoder", ["mask_transformer", "linear"])
@pytest.mark.parametrize("distilled", [False, True], ids=["vit", "deit"])
@pytest.mark.parametrize("image_size", [(48, 48), (32, 64)], ids=["square", "oblong"])
def test_logits_equal_the_original(tmp_path, image_size, distilled, decoder):
    variant = make_variant(image_size, distilled, decoder)
    weights = make_weights(variant)
    model = convert_segmenter_checkpoint(save_checkpoint(tmp_path, weights, variant), tmp_path / "out")
    assert not model.training
    # The size trained on, larger, oblong both ways, and sizes that are no multiple of the patch.
    for size in [image_size, (64, 64), (40, 72), (72, 32), (45, 67), (13, 90)]:
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            ours, theirs = model(images).logits, original_segmenter(images, weights, variant)
        assert ours.shape == (2, CLASSES, *size)
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_converted_folder_loads_again(tmp_path):
    variant = make_variant(distilled=True)
    model = convert_segmenter_checkpoint(save_checkpoint(tmp_path, make_weights(variant), variant), tmp_path / "out")
    again = SegmenterForSemanticSegmentation.from_pretrained(tmp_path / "out").eval()
    images = torch.randn(1, 3, 50, 60)
    with torch.no_grad():
        torch.testing.assert_close(again(images).logits, model(images).logits)
    processor = SegmenterImageProcessor.from_pretrained(tmp_path / "out")
    assert processor.image_mean == pytest.approx([0.485, 0.456, 0.406])
    assert (processor.window_size, processor.window_stride) == (48, 32)
    assert processor.size.shortest_edge == 48


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, v: w.pop("decoder.proj_dec.bias"), r"missing decoder\.proj_dec\.bias \[128\]"),
        (lambda w, v: w.pop("encoder.blocks.1.attn.qkv.weight"), r"missing encoder\.layers\.1\.attention\.k_proj"),
        (lambda w, v: w.update({"encoder.extra": torch.ones(1)}), r"no Segmenter has: encoder\.extra"),
        (lambda w, v: w.update({"decoder.head.bias": torch.ones(5)}), r"left over decoder\.head\.bias \[5\]"),
        (lambda w, v: w.update({"encoder.norm.bias": torch.ones(7)}), r"layernorm\.bias is \[7\], expected \[128\]"),
        (lambda w, v: v["net_kwargs"].update(n_cls=6), r"mask_norm\.weight is \[5\], expected \[6\]"),
        (lambda w, v: v["net_kwargs"].update(n_layers=2), r"left over encoder\.layers\.2\."),
        (lambda w, v: v["net_kwargs"].update(distilled=True), r"missing encoder\.embeddings\.distillation_token"),
        (lambda w, v: v["net_kwargs"].pop("d_model"), "net_kwargs has no d_model"),
        (lambda w, v: v["net_kwargs"].update(normalization="clip"), "normalization 'clip' is none of vit, deit"),
        (lambda w, v: v["net_kwargs"]["decoder"].update(name="deeplab"), "'deeplab' is neither"),
        (lambda w, v: v.pop("net_kwargs"), "no net_kwargs"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(tmp_path, change, message):
    variant = make_variant()
    weights = make_weights(variant)
    change(weights, variant)
    path = save_checkpoint(tmp_path, weights, variant)
    with pytest.raises(ValueError, match=message):
        convert_segmenter_checkpoint(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Anything:
    """Stands for an object that a checkpoint from a stranger may hold."""


def test_files_that_are_no_checkpoint(tmp_path):
    variant = make_variant()
    path = save_checkpoint(tmp_path, make_weights(variant), variant)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"not a checkpoint", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint\.pth cannot be read as weights alone"):
            convert_segmenter_checkpoint(path, tmp_path / "out")
    torch.save({"model": Anything()}, path)
    with pytest.raises(ValueError, match="cannot be read as weights alone"):
        convert_segmenter_checkpoint(path, tmp_path / "out")
    torch.save(make_weights(variant), path)
    with pytest.raises(ValueError, match='no entry "model"'):
        convert_segmenter_checkpoint(path, tmp_path / "out")
    path.unlink()
    with pytest.raises(ValueError, match="no checkpoint at"):
        convert_segmenter_checkpoint(path, tmp_path / "out")
    (tmp_path / "variant.yml").write_text("net_kwargs: !!python/object:os.system {}")
    with pytest.raises(ValueError, match="not plain YAML"):
        convert_segmenter_checkpoint(path, tmp_path / "out")
    (tmp_path / "variant.yml").unlink()
    with pytest.raises(ValueError, match=r"no variant\.yml beside"):
        convert_segmenter_checkpoint(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
