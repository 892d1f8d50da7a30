"""The native Segmenter as a transformers model: shapes, saving, Auto classes, compilation, precision, errors."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSemanticSegmentation, DeiTModel, ViTConfig, ViTModel

from ailurus_hf.segmenter import SegmenterConfig, SegmenterForSemanticSegmentation
from ailurus_hf.segmenter.modeling_segmenter import resize_position_embeddings

LABELS = 5


def tiny_config(model_type="vit", decoder="mask_transformer", image_size=(32, 48), **fields):
    encoder = {
        "model_type": model_type,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "patch_size": 8,
        "image_size": list(image_size),
    }
    return SegmenterConfig(encoder_config=encoder, decoder_type=decoder, num_labels=LABELS, **fields)


def tiny_model(*args, **kwargs):
    torch.manual_seed(0)
    model = SegmenterForSemanticSegmentation(tiny_config(*args, **kwargs)).eval()
    # Spread wide enough that a wrong position or a wrong class token changes the result visibly.
    torch.nn.init.normal_(model.encoder.embeddings.position_embeddings)
    return model


every_kind = pytest.mark.parametrize("kind", [(e, d) for e in ("vit", "deit") for d in ("mask_transformer", "linear")])


@every_kind
@pytest.mark.parametrize("size", [(32, 48), (64, 64), (33, 47), (7, 90), (1, 1)])
def test_logits_cover_every_pixel_of_any_size(kind, size):
    model = tiny_model(*kind)
    logits = model(torch.randn(2, 3, *size)).logits
    assert logits.shape == (2, LABELS, *size)
    assert logits.isfinite().all()


def test_padding_is_zeros_right_and_bottom_cut_off_again():
    model = tiny_model()
    images = torch.randn(1, 3, 30, 41)
    padded = F.pad(images, (0, 7, 0, 2))
    torch.testing.assert_close(model(images).logits, model(padded).logits[..., :30, :41])


def test_encoder_is_transformers_own():
    assert type(tiny_model("vit").encoder) is ViTModel
    assert type(tiny_model("deit").encoder) is DeiTModel
    # At the very grid of the position embeddings nothing of ours is left: the plain encoder gives the same.
    model = tiny_model("vit")
    plain = ViTModel(model.config.encoder_config, add_pooling_layer=False).eval()
    plain.load_state_dict(model.encoder.state_dict())
    images = torch.randn(2, 3, 32, 48)
    ours = model.encoder(images, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(ours, plain(images).last_hidden_state, rtol=0, atol=0)


def test_position_embeddings_keep_prefix_and_orientation():
    table = torch.zeros(1, 2 + 2 * 3, 1)
    table[0, :2, 0] = torch.tensor([7.0, 8.0])
    table[0, 2:, 0] = torch.tensor([0.0, 1, 2, 10, 11, 12])  # 10 * row + column
    assert resize_position_embeddings(table, (2, 3), (2, 3)) is table
    wide = resize_position_embeddings(table, (2, 3), (2, 6))[0, :, 0]
    assert wide[:2].tolist() == [7.0, 8.0]
    np.testing.assert_allclose(wide[2:8], [0, 0.25, 0.75, 1.25, 1.75, 2])  # bilinear, corners not aligned
    np.testing.assert_allclose(wide[8:], wide[2:8] + 10)


@every_kind
def test_decoder_takes_any_number_of_tokens(kind):
    decoder = tiny_model(*kind).decoder
    for length in (1, 3, 24):
        assert decoder(torch.randn(2, length, 32)).shape == (2, length, LABELS)


def test_class_tokens_come_last():
    model, lengths = tiny_model(), []
    first = model.decoder.layers[0]
    first.register_forward_pre_hook(lambda _, args: lengths.append(args[0]))
    tokens = torch.randn(1, 4, 32)
    model.decoder(tokens)
    assert lengths[0].shape == (1, 4 + LABELS, 32)
    torch.testing.assert_close(lengths[0][:, 4:], model.decoder.cls_emb)


def test_tokens_decode_the_same_in_any_order():
    decoder, tokens = tiny_model().decoder, torch.randn(1, 6, 32)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    torch.testing.assert_close(decoder(tokens)[:, order], decoder(tokens[:, order]))


@every_kind
def test_batch_gives_the_same_as_each_image_alone(kind):
    model, images = tiny_model(*kind), torch.randn(3, 3, 40, 50)
    together = model(images).logits
    for i in range(3):
        torch.testing.assert_close(model(images[i : i + 1]).logits[0], together[i], atol=1e-5, rtol=1e-5)


def test_loss_ignores_the_ignored_and_only_those():
    model = tiny_model(semantic_loss_ignore_index=4)
    images, labels = torch.randn(2, 3, 20, 30), torch.randint(0, 4, (2, 20, 30))
    labels[:, :7] = 4
    out = model(images, labels=labels)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[:, :, 7:], labels[:, 7:]))
    assert SegmenterConfig().semantic_loss_ignore_index == 255


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"labels of shape \(2, 16, 24\).*expected \(2, 32, 48\)"):
        tiny_model()(torch.randn(2, 3, 32, 48), labels=torch.zeros(2, 16, 24, dtype=torch.long))


def test_hidden_states_attentions_and_tuples():
    model, images = tiny_model("deit", attn_implementation="eager"), torch.randn(1, 3, 16, 24)
    out = model(images, output_hidden_states=True, output_attentions=True)
    assert [h.shape for h in out.hidden_states] == [(1, 2 + 6, 32)] * 3  # class and distillation token, 2 x 3 patches
    assert [a.shape for a in out.attentions] == [(1, 2, 8, 8)] * 2
    as_tuple = model(images, return_dict=False)
    torch.testing.assert_close(as_tuple[0], out.logits)


@every_kind
def test_save_and_load_through_the_auto_classes(kind, tmp_path):
    model = tiny_model(*kind, id2label={i: f"thing {i}" for i in range(LABELS)})
    model.save_pretrained(tmp_path)
    again = AutoModelForSemanticSegmentation.from_pretrained(tmp_path).eval()
    assert type(again) is SegmenterForSemanticSegmentation
    images = torch.randn(1, 3, 20, 30)
    torch.testing.assert_close(again(images).logits, model(images).logits, rtol=0, atol=0)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.id2label[3] == "thing 3" and config.num_labels == LABELS
    assert config.encoder_config.model_type == kind[0]
    assert list(config.encoder_config.image_size) == [32, 48] and config.encoder_config.layer_norm_eps == 1e-5
    if kind[1] == "mask_transformer":
        assert config.decoder_config.to_diff_dict() == model.config.decoder_config.to_diff_dict()


@every_kind
def test_sdpa_and_eager_agree_in_encoder_and_decoder(kind, caplog):
    model, images = tiny_model(*kind), torch.randn(1, 3, 40, 40)
    fast = model(images).logits
    used = {m.config._attn_implementation for m in model.modules() if hasattr(getattr(m, "config", None), "patch_size")}
    assert used == {"sdpa"}
    with caplog.at_level("WARNING"):
        model.set_attn_implementation("eager")
    assert not caplog.records
    used = {m.config._attn_implementation for m in model.modules() if hasattr(getattr(m, "config", None), "patch_size")}
    assert used == {"eager"}
    torch.testing.assert_close(model(images).logits, fast, atol=1e-5, rtol=1e-5)


@every_kind
def test_gradient_checkpointing_gives_equal_gradients(kind):
    model = tiny_model(*kind).train()
    other = copy.deepcopy(model)
    getattr(other, "activation_checkpointing_enable", other.gradient_checkpointing_enable)()
    assert other.encoder.layers[0].gradient_checkpointing
    images, labels = torch.randn(2, 3, 24, 24), torch.randint(0, LABELS, (2, 24, 24))
    for m in (model, other):
        m(images, labels=labels).loss.backward()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert a.grad is not None, name
        torch.testing.assert_close(a.grad, b.grad, msg=name)


@every_kind
def test_compiles_in_one_graph_without_recompiling(kind):
    torch._dynamo.reset()
    model = tiny_model(*kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            images = torch.randn(1, 3, 30, 41)
            torch.testing.assert_close(compiled(images).logits, model(images).logits)


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(kind, dtype):
    model, images = tiny_model(*kind), torch.randn(1, 3, 30, 40)
    exact = model(images).logits
    logits = model.to(dtype)(images).logits
    assert logits.dtype == dtype
    assert (logits.float() - exact).abs().mean() < 0.1 * exact.std()


def test_defaults_are_the_originals():
    config = SegmenterConfig(encoder_config={"model_type": "vit", "hidden_size": 192, "num_attention_heads": 3})
    assert config.encoder_config.layer_norm_eps == config.decoder_config.layer_norm_eps == 1e-5
    assert config.encoder_config.hidden_act == "gelu" and config.encoder_config.qkv_bias
    assert (config.decoder_config.hidden_size, config.decoder_config.num_attention_heads) == (192, 3)
    assert (config.decoder_config.num_hidden_layers, config.decoder_config.intermediate_size) == (2, 768)
    assert tiny_config(decoder="linear").decoder_config is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder_config": {"model_type": "swin"}}, "vit, deit, not 'swin'"),
        ({"encoder_config": ViTConfig(patch_size=(16, 8))}, r"one integer, not \(16, 8\)"),
        ({"encoder_config": {"hidden_size": 100}}, "encoder's hidden_size 100 is not a multiple of .* 12"),
        ({"decoder_config": {"num_attention_heads": 7}}, "decoder's hidden_size 768 is not a multiple of .* 7"),
        ({"decoder_type": "linear", "decoder_config": {}}, "leave decoder_config out"),
        ({"decoder_type": "fpn"}, "decoder_type"),
    ],
)
def test_configurations_that_cannot_be_built(fields, message):
    with pytest.raises(Exception, match=message) as caught:
        SegmenterConfig(**fields)
    assert isinstance(caught.value, ValueError) or "decoder_type" in message
