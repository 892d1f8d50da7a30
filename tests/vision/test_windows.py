"""VitDet and SAM: global layers run on representatives, and everything else on the grid as before."""

import copy

import accelerate
import pytest
import torch
from models import enable_checkpointing
from windowed import MODELS, images, make, predict

from ailurus_hf import (
    AiluRusConfig,
    AiluRusError,
    AiluRusModel,
    TokenClusters,
    ailurus_status,
    apply_ailurus,
    remove_ailurus,
)
from ailurus_hf.vision.apply import reducers_of
from ailurus_hf.vision.forward_state import Reduction
from ailurus_hf.vision.windows import LayerState

REDUCED = {"cluster_location": 1, "keep_ratio": 0.25}
each_model = pytest.mark.parametrize("name", MODELS)


def blocky(batch=2):
    """Every 2 x 2 patches are equal, and two neighboring blocks of one window are, so that counts differ."""
    patches = torch.randn(batch, 3, 4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    patches[:, :, 0, 1] = patches[:, :, 0, 0]
    tiled = patches.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return tiled.permute(0, 1, 2, 4, 3, 5).reshape(batch, 3, 32, 32)


@each_model
def test_on_and_off(name):
    model, x = make(name), images()
    plain = predict(model, x)
    before = [sorted(vars(module)) for module in model.modules()]
    apply_ailurus(model, **REDUCED)
    reduced = predict(model, x)
    assert reduced.shape == plain.shape and (reduced - plain).abs().max() > 1e-2 * plain.abs().max()
    rows = ailurus_status(model).locations
    assert [row.location for row in rows] == [1, 3]
    assert all((p.num_tokens, p.num_clusters, p.clusterings) == (64, 16, 1) and p.flops_saved > 0.5 for p in rows)
    for i in range(2):
        torch.testing.assert_close(predict(model, x[i : i + 1]), reduced[i : i + 1], rtol=1e-4, atol=1e-4)
    assert torch.equal(predict(copy.deepcopy(model), x), reduced)
    remove_ailurus(model)
    assert torch.equal(predict(model, x), plain)
    assert [sorted(vars(module)) for module in model.modules()] == before
    apply_ailurus(model, cluster_location=1, num_clusters=64)
    assert torch.equal(predict(model, x), plain)


@each_model
def test_saved_and_loaded_with_its_settings(name, tmp_path):
    model, x = apply_ailurus(make(name), **REDUCED), images()
    want = predict(model, x)
    model.save_pretrained(tmp_path)
    loaded = AiluRusModel.from_pretrained(tmp_path).eval()
    assert ailurus_status(loaded).config == AiluRusConfig(**REDUCED).to_dict()
    assert torch.equal(predict(loaded, x), want)


@each_model
def test_hidden_states_are_those_of_all_tokens(name):
    model, x = make(name), images()
    with torch.no_grad():
        plain = model(x, output_hidden_states=True).hidden_states
        states = apply_ailurus(model, **REDUCED)(x, output_hidden_states=True).hidden_states
    assert [state.shape for state in states] == [state.shape for state in plain]
    assert torch.equal(states[1], plain[1]) and not torch.equal(states[2], plain[2])


@each_model
def test_weights_that_accelerate_keeps_elsewhere(name):
    model, x = make(name), images()
    plain, want = predict(model, x), predict(apply_ailurus(model, **REDUCED), x)
    accelerate.cpu_offload(remove_ailurus(model), torch.device("cpu"))
    assert {str(p.device) for p in model.parameters()} == {"meta"}
    assert torch.equal(predict(apply_ailurus(model, **REDUCED), x), want)
    assert torch.equal(predict(remove_ailurus(model), x), plain)


@each_model
@pytest.mark.parametrize("unwrapped", [False, True])
def test_what_accelerate_wraps_after_it_was_switched_on_stays_wrapped(name, unwrapped):
    model, x = make(name), images()
    plain, want = predict(model, x), predict(apply_ailurus(model, **REDUCED), x)
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert torch.equal(predict(model, x), want)
    if unwrapped:
        accelerate.hooks.remove_hook_from_submodules(model)
        assert torch.equal(predict(model, x), want)
    remove_ailurus(model)
    assert unwrapped != any(hasattr(module, "_hf_hook") for module in model.modules())
    assert torch.equal(predict(model, x), plain)


@each_model
def test_equals_the_plain_model_on_duplicated_tokens(name):
    model, x = make(name), blocky()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "rel_pos" in parameter_name or "pos_embed" in parameter_name or "position_embeddings" in parameter_name:
                parameter.zero_()
    plain = predict(model, x)
    reduced = predict(apply_ailurus(model, cluster_location=1, num_clusters=15), x)
    torch.testing.assert_close(reduced, plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())


@each_model
def test_attention_of_single_tokens_is_the_models_own(name):
    model = apply_ailurus(make(name), **REDUCED)
    reducer = reducers_of(model)[0]
    hidden = torch.randn(2, 8, 8, 32)
    clusters = TokenClusters.from_assignment(torch.arange(64).expand(2, -1), 64)
    with torch.no_grad():
        want = type(reducer.attention).forward(reducer.attention, hidden)[0]
        reducer.states.set(LayerState(Reduction(1, (8, 8), clusters, hidden.flatten(1, 2), hidden.flatten(1, 2))))
        got = reducer.attention(hidden.view(2, 64, 1, 32))[0]
    torch.testing.assert_close(got.view(2, 8, 8, 32), want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


@each_model
def test_gradients_but_not_with_checkpointing(name):
    model = apply_ailurus(make(name), **REDUCED).train()
    model(images()).last_hidden_state.square().sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without
    enable_checkpointing(model)
    with pytest.raises(AiluRusError, match=r"checkpointing of .*Layer loses the clusters"):
        model(images())


@each_model
def test_compiles(name):
    model, x = apply_ailurus(make(name), **REDUCED), images()
    want = predict(model, x)
    torch.testing.assert_close(predict(torch.compile(model, backend="aot_eager"), x), want, rtol=1e-4, atol=1e-4)


@each_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype):
    model, x = apply_ailurus(make(name).to(dtype), **REDUCED), images().to(dtype)
    out = predict(model, x)
    assert out.dtype == dtype and out.isfinite().all()


def test_other_grids():
    model = make("VitDet")
    x = torch.randn(1, 3, 24, 40)
    plain = predict(model, x)
    reduced = predict(apply_ailurus(model, **REDUCED), x)
    assert reduced.shape == plain.shape and ailurus_status(model).locations[0].num_clusters == 15


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"cluster_location": 4, "keep_ratio": 0.5}, r"layers \[2, 4\] of 4 have global attention"),
        ({"cluster_location": 1, "keep_ratio": 0.5, "restore": "copy"}, "restore='residual'"),
        ({"cluster_location": (1, 2), "keep_ratio": (0.5, 0.2)}, r"got \(1, 2\)"),
    ],
)
def test_wrong_settings_are_named(fields, message):
    with pytest.raises(AiluRusError, match=message):
        apply_ailurus(make("SAM"), **fields)


def test_convolutions_after_a_global_layer_are_refused():
    with pytest.raises(AiluRusError, match="layer 4 ends in convolutions"):
        apply_ailurus(make("VitDet", residual_block_indices=[3]), **REDUCED)
