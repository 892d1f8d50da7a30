"""What has to hold on every supported model: identity, equality, on/off, saving, training, compiling, batches."""

import copy
import os
import shutil
import threading

import pytest
import torch
from model_parts import DEPTH, GRID
from models import (
    CASES,
    blocky_images_for,
    enable_checkpointing,
    images,
    images_for,
    make_model,
    of_encoder,
    predict,
    run,
    without_positions,
)
from traces import traces

import ailurus_hf
from ailurus_hf import AiluRusConfig, ailurus_status, apply_ailurus, remove_ailurus
from ailurus_hf.vision.discovery import find_encoders

CONFIGS = {
    "paper": AiluRusConfig(
        cluster_location=1, keep_ratio=0.25, clustering="density_peaks", restore="copy", restore_at="decoder"
    ),
    "from the embeddings": AiluRusConfig(cluster_location=0, keep_ratio=0.25),
    "residual": AiluRusConfig(cluster_location=1, keep_ratio=0.25, restore="residual"),
    "copy at backbone": AiluRusConfig(cluster_location=2, keep_ratio=0.25, restore="copy", restore_at="backbone"),
    "restored early": AiluRusConfig(cluster_location=1, keep_ratio=0.25, restore="residual", restore_location=3),
    "smooth": AiluRusConfig(cluster_location=1, keep_ratio=0.25, restore="smooth"),
    "density peaks": AiluRusConfig(cluster_location=1, keep_ratio=0.25, clustering="density_peaks"),
}
CONFIGS["two locations"] = AiluRusConfig(
    cluster_location=(1, 2), keep_ratio=(0.5, 0.25), clustering="density_peaks", restore="residual"
)
CONFIGS["two locations, pairs"] = AiluRusConfig(cluster_location=(1, 2), keep_ratio=(0.5, 0.25), clustering="pairs")
# What hooks do is the same in all models, so a few are tested with all settings, and the others with some.
SOME = ("paper", "two locations")
WAYS = [(name, way) for name, case in CASES.items() for way in (CONFIGS if case.every_way else SOME)]
on_every_model = pytest.mark.parametrize("name", CASES)


def in_ways(ways):
    return pytest.mark.parametrize(
        "name, config", [(name, CONFIGS[way]) for name, way in ways], ids=[f"{name}-{way}" for name, way in ways]
    )


on_every_model_in_its_ways = in_ways(WAYS)
on_every_model_that_trains = in_ways([(name, way) for name, way in WAYS if CASES[name].trains])
ATTENTION_OUTPUTS = (
    "o_proj.weight",
    "out_proj.weight",
    "attention.output.dense.weight",
    "self_attn.projection.weight",
)


def loss(prediction):
    """Weighs the outputs at random: a sum of squares says nothing of what a layer norm made."""
    return (prediction * torch.randn(prediction.shape, generator=torch.Generator().manual_seed(7))).sum()


@on_every_model_in_its_ways
def test_changes_the_output_and_is_undone_bit_for_bit(name, config):
    model, x = make_model(name), images_for(name)
    plain, before = predict(model, name, x), traces(model)
    assert apply_ailurus(model, config) is model
    reduced = predict(model, name, x)
    assert reduced.shape == plain.shape
    assert (reduced - plain).abs().max() > 1e-2 * plain.abs().max()
    assert torch.equal(predict(model, name, x), reduced)
    remove_ailurus(model)
    assert torch.equal(predict(model, name, x), plain)
    assert traces(model) == before
    assert not ailurus_status(model).active


@on_every_model
def test_identity_where_no_token_has_to_go(name):
    model, x = make_model(name), images_for(name)
    plain, tokens = predict(model, name, x), CASES[name].num_tokens
    for fields in ({"keep_ratio": 1.0}, {"num_clusters": tokens}, {"num_clusters": (10**6, 10**5)}):
        location = (1, 2) if isinstance(fields.get("num_clusters"), tuple) else 1
        apply_ailurus(model, cluster_location=location, **fields)
        assert torch.equal(predict(model, name, x), plain)
        for location in ailurus_status(model).locations:
            assert (location.num_tokens, location.num_clusters, location.clusterings) == (tokens, tokens, 0)


@on_every_model_in_its_ways
def test_equals_the_plain_model_on_duplicated_tokens(name, config):
    model, x = without_positions(make_model(name)), blocky_images_for(name)
    plain = predict(model, name, x)
    apply_ailurus(model, config)
    reduced = predict(model, name, x)
    assert ailurus_status(model).locations[-1].num_clusters == CASES[name].num_tokens // 4
    torch.testing.assert_close(reduced, plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())


@on_every_model
def test_on_twice_replaces(name):
    model, x = make_model(name), images_for(name)
    apply_ailurus(model, cluster_location=2, keep_ratio=0.25)
    once = predict(model, name, x)
    hooks = traces(model)
    apply_ailurus(model, cluster_location=1, keep_ratio=0.5)
    apply_ailurus(model, cluster_location=2, keep_ratio=0.25)
    assert torch.equal(predict(model, name, x), once)
    assert traces(model) == hooks


@on_every_model_in_its_ways
def test_hidden_states_are_all_tokens_long(name, config):
    # transformers adds its hooks at the first request: here before, in the other test after ours.
    for requested_before in (False, True):
        model, x = make_model(name), images_for(name)
        with torch.no_grad():
            plain = of_encoder(run(model, x, output_hidden_states=True)).hidden_states if requested_before else None
            apply_ailurus(model, config)
            states = of_encoder(run(model, x, output_hidden_states=True)).hidden_states
            as_tuple = run(model, x, output_hidden_states=True, return_dict=False)
            remove_ailurus(model)
            plain = plain or of_encoder(run(model, x, output_hidden_states=True)).hidden_states
        assert [h.shape for h in states] == [h.shape for h in plain]
        for location in range(config.locations[0] + 1):
            assert torch.equal(states[location], plain[location])
        assert not torch.equal(states[-1], plain[-1])
        again = next((part for part in as_tuple if isinstance(part, tuple) and len(part) == len(states)), None)
        if again is not None:  # CLIPModel's tuple holds its towers' outputs
            assert all(torch.equal(a, b) for a, b in zip(again, states, strict=True))


@on_every_model_that_trains
def test_gradient_checkpointing_gives_equal_gradients(name, config):
    x = images_for(name)
    gradients = []
    for checkpointing in (False, True):
        model = make_model(name).train()
        if not model.supports_gradient_checkpointing:
            pytest.skip("transformers has no gradient checkpointing here")
        apply_ailurus(model, config)
        if checkpointing:
            enable_checkpointing(model)
        torch.manual_seed(1)
        loss(CASES[name].prediction(run(model, x))).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys() and len(plain) > 10 * DEPTH
    for parameter in plain:
        torch.testing.assert_close(checkpointed[parameter], plain[parameter], rtol=1e-5, atol=1e-6)
    patches = next(grad for n, grad in plain.items() if "patch_embed" in n or "patch_projection" in n)
    assert patches.abs().max() > 0


@on_every_model_that_trains
def test_gradients_equal_the_plain_model_on_duplicated_tokens(name, config):
    # In double precision: a head's ReLU may see a number so near zero that single precision rounds it to either side
    # (DPT over DINOv2 on torch 2.14: 2e-10 plain, -8e-11 reduced, where 1e-3 is usual), and its gradient jumps.
    # But EoMT makes its masks in single precision, which torch's attention on the CPU misreads beside double.
    dtype = torch.float32 if name == "EoMT(predicting masks)" else torch.float64
    x, gradients = blocky_images_for(name).to(dtype), []
    for reduced in (False, True):
        model = without_positions(make_model(name)).to(dtype)
        if reduced:
            apply_ailurus(model, config)
        leaf = x.clone().requires_grad_()
        loss(CASES[name].prediction(run(model, leaf))).backward()
        # How the gradient divides among equal patches is the merge's choice; their sum is not.
        patch = CASES[name].patch
        blocks = leaf.grad.unflatten(-1, (-1, 2, patch)).unflatten(2, (-1, 2, patch)).sum((3, 6))
        # None where nobody reads: a head may leave out the last layers, and a text tower has no images.
        outputs = [p.grad for n, p in model.named_parameters() if n.endswith(ATTENTION_OUTPUTS) and p.grad is not None]
        assert len(outputs) >= DEPTH - 1
        gradients.append([blocks, *outputs])
    for got, want in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * want.abs().max().item())


def hidden(output):
    return output[0] if isinstance(output, tuple) else output


@on_every_model
def test_hooks_of_the_users_see_all_tokens_of_the_last_layer(name):
    model, seen = make_model(name), []
    find_encoders(model)[0].layers[-1].register_forward_hook(
        lambda layer, args, output: seen.append(hidden(output).shape[1])
    )
    apply_ailurus(model, cluster_location=1, keep_ratio=0.25, restore_at="backbone")
    predict(model, name, images_for(name))
    assert seen[0] >= CASES[name].num_tokens


@on_every_model_in_its_ways
def test_an_image_gives_the_same_alone_and_in_a_batch(name, config):
    model, x = make_model(name), images_for(name, batch=3)
    apply_ailurus(model, config)
    together = predict(model, name, x)
    for i in range(3):
        alone = predict(model, name, x[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-4 * together.abs().max().item())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.any_size])
def test_other_sizes(name):
    model = make_model(name)
    for grid in SIZES_OF_HEADS if "over" in name or "Segmentation" in name or name == "DepthAnything" else SIZES:
        x = images(grid=grid)
        plain = predict(remove_ailurus(model), name, x)
        apply_ailurus(model, cluster_location=1, num_clusters=4)
        reduced = predict(model, name, x)
        assert reduced.shape == plain.shape and reduced.isfinite().all()
        assert ailurus_status(model).locations[0].num_tokens == grid[0] * grid[1]


SIZES = ((5, 7), (1, 12), (3, 3))
SIZES_OF_HEADS = ((6, 10), (8, 4))  # necks halve the grid and double it again


@on_every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype):
    model, x = without_positions(make_model(name)).to(dtype), blocky_images_for(name).to(dtype)
    plain = predict(model, name, x)
    apply_ailurus(model, cluster_location=1, keep_ratio=0.25)
    reduced = predict(model, name, x)
    assert reduced.dtype == plain.dtype
    difference = (reduced.float() - plain.float()).abs().mean() / plain.float().abs().mean()
    assert difference < 0.1


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.maps])
def test_eager_attention_still_returns_maps(name):
    model, x = make_model(name), images_for(name)
    sdpa = predict(apply_ailurus(model, cluster_location=1, keep_ratio=0.25), name, x)
    remove_ailurus(model)
    model.set_attn_implementation("eager")
    apply_ailurus(model, cluster_location=1, keep_ratio=0.25)
    with torch.no_grad():
        out = run(model, x, output_attentions=True)
    torch.testing.assert_close(CASES[name].prediction(out), sdpa, rtol=1e-4, atol=1e-4 * sdpa.abs().max().item())
    maps = of_encoder(out).attentions
    assert maps[0].shape[-1] - maps[-1].shape[-1] > CASES[name].num_tokens // 2


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.auto])
def test_saved_and_loaded_with_its_settings(name, tmp_path):
    model, x = make_model(name), images_for(name)
    config = AiluRusConfig(cluster_location=(1, 2), keep_ratio=(0.5, 0.3), restore="residual")
    reduced = predict(apply_ailurus(model, config), name, x)
    model.save_pretrained(tmp_path)
    auto = getattr(ailurus_hf, CASES[name].auto)
    loaded = auto.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    assert ailurus_status(loaded).config == config.to_dict()
    torch.testing.assert_close(predict(loaded, name, x), reduced)
    other = auto.from_pretrained(tmp_path, ailurus_config={"cluster_location": 2, "num_clusters": 9})
    assert ailurus_status(other).config["num_clusters"] == 9
    plain = predict(remove_ailurus(model), name, x)
    remove_ailurus(loaded).save_pretrained(tmp_path)
    torch.testing.assert_close(predict(auto.auto_class.from_pretrained(tmp_path).eval(), name, x), plain)
    assert "ailurus_config" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.compiles])
def test_compiles_to_one_graph(name):
    case = CASES[name]
    model = apply_ailurus(make_model(name), cluster_location=1, keep_ratio=0.25)
    torch.compiler.reset()
    # transformers adds its own hooks for hidden states in a model's first forward, under a lock that does not compile.
    predict(model, name, images(1, case.grid, 0, case.patch))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    # Each size compiles for seconds, so several are for a model that takes the bias as its mask, and one by an adapter.
    several = name in ("ViTModel", "Data2VecVisionModel") or os.environ.get("AILURUS_TEST_EVERY")
    for grid in (case.grid, (6, 6), (10, 4)) if several and case.any_size else (case.grid,):
        for batch, seed in ((1, 0), (1, 1), (3, 2)):
            x = images(batch, grid, seed, case.patch)
            with torch._dynamo.config.patch(error_on_recompile=seed == 1):
                got = predict(compiled, name, x)
            want = predict(model, name, x)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="torch's default compiler needs C++")
def test_the_default_compiler_gives_the_same():
    name = "Segmenter(ViT, mask transformer)"
    model = apply_ailurus(make_model(name), cluster_location=1, keep_ratio=0.25)
    compiled = torch.compile(model, fullgraph=True)
    for grid in (GRID, (6, 10)):
        x = images(grid=grid)[..., 1:]  # a width that is no multiple of the patch
        want = predict(model, name, x)
        torch.testing.assert_close(predict(compiled, name, x), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def test_a_compiled_model_notices_on_and_off():
    name = "ViTForImageClassification"
    model, x = make_model(name), images_for(name)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    plain = predict(compiled, name, x)
    apply_ailurus(model, cluster_location=1, keep_ratio=0.25)
    assert (predict(compiled, name, x) - plain).abs().max() > 1e-2
    remove_ailurus(model)
    torch.testing.assert_close(predict(compiled, name, x), plain)


def test_two_threads_share_a_model():
    name = "Segmenter(ViT, mask transformer)"
    model = apply_ailurus(make_model(name), cluster_location=1, keep_ratio=0.25)
    inputs = [images(1, grid, 0) for grid in ((8, 12), (5, 7))]
    want = [predict(model, name, x) for x in inputs]
    # Both forwards stand still between clustering and unmerging until the other one is there.
    both = threading.Barrier(2, timeout=30)
    model.encoder.layers[2].register_forward_hook(lambda *_: [both.wait(), None][1])
    got = [None, None]

    def work(index):
        got[index] = predict(model, name, inputs[index])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@on_every_model
def test_a_deep_copy_is_reduced_and_on_its_own(name):
    model, x = make_model(name), images_for(name)
    plain = predict(model, name, x)
    reduced = predict(apply_ailurus(model, cluster_location=1, keep_ratio=0.25), name, x)
    twin = copy.deepcopy(model)
    remove_ailurus(model)
    assert torch.equal(predict(twin, name, x), reduced)
    assert torch.equal(predict(model, name, x), plain)
    remove_ailurus(twin)
    assert torch.equal(predict(twin, name, x), plain)
