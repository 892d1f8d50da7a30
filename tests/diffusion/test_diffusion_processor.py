"""AiluRusProcessor as users set it, without apply_ailurus: grids, cross-attention, backends, and its kernel."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusion_models import TEXT, generate, latents, make_network, make_pipeline, predict, text

from ailurus_hf import (
    AiluRusError,
    AiluRusProcessor,
    UnsupportedModelError,
    ailurus_status,
    apply_ailurus,
    remove_ailurus,
)
from ailurus_hf.diffusion import backend

SQUARE = (8, 8)


def layer(**fields):
    torch.manual_seed(0)
    attn = Attention(32, heads=2, dim_head=16, **fields).eval()
    with torch.no_grad():
        attn.to_q.weight.mul_(6)
        attn.to_k.weight.mul_(6)
    return attn


def call(attn, processor, *args, **kwargs):
    with torch.no_grad():
        return processor(attn, *args, **kwargs)


@pytest.mark.parametrize("reduce", ["qkv", "kv"])
@pytest.mark.parametrize("clustering", ["local_kmeans", "density_peaks"])
def test_self_attention_equals_plain_on_duplicated_tokens(reduce, clustering):
    attn = layer()
    small = torch.randn(2, 4, 6, 32)
    small[:, :, 1::4] = small[:, :, 0::4]  # so that clusters differ in size
    tokens = small.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    processor = AiluRusProcessor(0.25, (8, 12), min_tokens=1, reduce=reduce, clustering=clustering)
    got, want = call(attn, processor, tokens), call(attn, AttnProcessor2_0(), tokens)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    different = torch.randn(2, 96, 32)
    got, want = call(attn, processor, different), call(attn, AttnProcessor2_0(), different)
    assert (got - want).abs().max() > 1e-2


@pytest.mark.parametrize(
    "fields",
    [{}, {"qk_norm": "layer_norm"}, {"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 2.0}],
    ids=str,
)
def test_whatever_is_not_merged_is_exact(fields):
    tokens, image = torch.randn(2, 64, 32), torch.randn(2, 32, 8, 8)
    attn, every = layer(**fields), AiluRusProcessor(1.0, min_tokens=1)
    merging = AiluRusProcessor(0.25, min_tokens=1)
    plain = AttnProcessor2_0()
    torch.testing.assert_close(call(attn, every, tokens), call(attn, plain, tokens))
    torch.testing.assert_close(call(attn, every, image), call(attn, plain, image))
    assert call(attn, merging, image).shape == image.shape
    mask = torch.zeros(2, 1, 64).index_fill(2, torch.arange(20), -1e4)
    torch.testing.assert_close(call(attn, merging, tokens, None, mask), call(attn, plain, tokens, None, mask))
    torch.testing.assert_close(call(attn, AiluRusProcessor(), tokens), call(attn, plain, tokens))  # below min_tokens
    cross = layer(cross_attention_dim=TEXT, cross_attention_norm="layer_norm", **fields)
    mask = torch.zeros(2, 1, 5).index_fill(2, torch.arange(2), -1e4)
    for given in (None, mask):
        got, want = call(cross, merging, tokens, text(2), given), call(cross, plain, tokens, text(2), given)
        torch.testing.assert_close(got, want)


def test_grids_are_inferred_given_or_refused():
    attn = layer()
    square, given = AiluRusProcessor(min_tokens=1), AiluRusProcessor(grid=(9, 14), min_tokens=1)
    assert square.source.grid_of(64) == (8, 8)
    for grid in ((9, 14), (5, 7), (3, 4), (2, 2)):
        assert given.source.grid_of(grid[0] * grid[1]) == grid
    with pytest.raises(AiluRusError, match=r"96 tokens are no square: give grid=\(H, W\)"):
        call(attn, square, torch.randn(1, 96, 32))
    for wrong in (96, 36, 200):
        with pytest.raises(AiluRusError, match=rf"latents of \(9, 14\) has {wrong} tokens"):
            call(attn, given, torch.randn(1, wrong, 32))
    with pytest.raises(AiluRusError, match=r"\(8, 8, 8\)"):
        AiluRusProcessor(grid=(8, 8, 8))
    with pytest.raises(AiluRusError, match=r"\{1: 0.5\}"):
        AiluRusProcessor({1: 0.5})
    with pytest.raises(AiluRusError, match=r"reduce.*\{1: 'kv'\}"):
        AiluRusProcessor(reduce={1: "kv"})
    with pytest.raises(AiluRusError, match="scope"):
        AiluRusProcessor(scope="blocks")
    with pytest.raises(UnsupportedModelError, match="added text keys"):
        call(layer(added_kv_proj_dim=8, only_cross_attention=False), AiluRusProcessor(), torch.randn(1, 4, 32))


@pytest.mark.parametrize("shared", [True, False])
def test_set_as_users_do(shared):
    unet, x = make_network("UNet"), latents((4, *SQUARE))
    plain = predict(unet, "UNet", x)
    stock = dict(unet.attn_processors)
    fields = {"keep_ratio": 0.25, "min_tokens": 12}
    unet.set_attn_processor(AiluRusProcessor(**fields) if shared else {n: AiluRusProcessor(**fields) for n in stock})
    reduced = predict(unet, "UNet", x)
    assert (reduced - plain).abs().max() > 1e-3 and torch.equal(predict(unet, "UNet", x), reduced)
    # The same as by apply_ailurus, but for reused assignments: at the first layer there are none.
    assert len(ailurus_status(unet).locations) == 7
    with pytest.raises(AiluRusError, match="96 tokens are no square"):
        predict(unet, "UNet", latents((4, 8, 12)))
    unet.set_attn_processor(AiluRusProcessor(**fields, grid=(8, 12)))
    assert predict(unet, "UNet", latents((4, 8, 12))).isfinite().all()
    unet.set_attn_processor(stock)
    assert torch.equal(predict(unet, "UNet", x), plain)
    assert not ailurus_status(unet).active


def test_no_arguments_are_valid_and_a_pipeline_runs():
    pipe = make_pipeline(StableDiffusionPipeline)
    plain = generate(pipe, size=SQUARE, steps=2)
    pipe.unet.set_attn_processor(AiluRusProcessor())
    torch.testing.assert_close(generate(pipe, size=SQUARE, steps=2), plain)  # 64 tokens: fewer than min_tokens
    pipe.unet.set_attn_processor(AiluRusProcessor(keep_ratio=0.5, min_tokens=16))
    assert (generate(pipe, size=SQUARE, steps=2) - plain).abs().max() > 1e-4


def test_compiles_with_the_processor_alone():
    unet = make_network("UNet")
    unet.set_attn_processor(AiluRusProcessor(0.25, min_tokens=12))
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager", dynamic=False)
    for size in ((8, 8), (12, 12)):
        x = latents((4, *size))
        want = predict(unet, "UNet", x)
        torch.testing.assert_close(predict(compiled, "UNet", x), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize("name", ["native", "_native_math"])
def test_the_chosen_backend_is_used(name, monkeypatch):
    unet, x, used = make_network("UNet"), latents((4, *SQUARE)), []
    unet.set_attn_processor(AiluRusProcessor(0.25, min_tokens=12))
    want = predict(unet, "UNet", x)
    dispatch = backend.dispatch_attention_fn
    monkeypatch.setattr(
        backend, "dispatch_attention_fn", lambda *a, **k: [used.append(k["backend"].value), dispatch(*a, **k)][1]
    )
    active = backend._AttentionBackendRegistry.get_active_backend()[0]
    try:
        unet.set_attention_backend(name)
        got = predict(unet, "UNet", x)
    finally:
        backend._AttentionBackendRegistry.set_active_backend(active)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert set(used) == (set() if name == "native" else {name})


def test_flash_backends_get_the_counts_in_a_channel(monkeypatch):
    seen = []

    def flash(query, key, value, attn_mask=None, scale=None, backend=None):
        assert attn_mask is None, "flash kernels take no mask"
        seen.append(query.shape[-1])
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2)

    monkeypatch.setattr(backend, "dispatch_attention_fn", flash)
    q, k, v = (torch.randn(2, 3, length, 16) for length in (7, 5, 5))
    bias = torch.rand(2, 5).mul(4).log()
    got = backend.attend(q, k, v, key_bias=bias, backend="flash")
    torch.testing.assert_close(got, backend.attend(q, k, v, key_bias=bias), rtol=1e-4, atol=1e-5)
    assert seen == [24]


def test_remove_leaves_what_others_have_put_there():
    unet = apply_ailurus(make_network("UNet"), keep_ratio=0.25, min_tokens=12, scope="attention")
    theirs = AttnProcessor2_0()
    unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.set_processor(theirs)
    remove_ailurus(unet)
    assert unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.processor is theirs
    assert not any(isinstance(p, AiluRusProcessor) for p in unet.attn_processors.values())
