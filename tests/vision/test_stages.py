"""SegFormer: reduced stages run queries and Mix-FFN's linear layers on representatives, all else on the grid."""

import pytest
import torch
from models import enable_checkpointing
from segformer import CLASSES, images, make, predict

from ailurus_hf import (
    AiluRusConfig,
    AiluRusError,
    AiluRusModelForSemanticSegmentation,
    ailurus_status,
    apply_ailurus,
    local_kmeans,
    remove_ailurus,
)

# Stage 3 of an image of 96 x 160 pixels is a grid of 6 x 10, stage 4 one of 3 x 5.
EVERY_STAGE = {"stages": (1, 2, 3, 4), "cluster_location": 0, "keep_ratio": 0.4}
SETTINGS = {
    "one stage": {"cluster_location": 1, "num_clusters": 20},
    "every stage": {**EVERY_STAGE, "clustering": "local_kmeans"},
    "restored early": {"cluster_location": 0, "keep_ratio": 0.3, "restore_location": 2},
}


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS)
def settings(request):
    return request.param


@pytest.mark.parametrize("number, grid", [(3, (6, 10)), (4, (3, 5))])
def test_a_reduced_stage_is_what_its_equations_say(number, grid):
    model = make("model")
    stage, seen = model.stages[number - 1], {}
    first = stage.blocks[1].register_forward_pre_hook(lambda _, args: seen.update(tokens=args[0]))
    stage.register_forward_hook(lambda _, args, output: seen.update(output=output))
    predict(model, images(), "model")
    first.remove()
    tokens = seen["tokens"]
    clusters = local_kmeans(tokens, grid, 6)
    assert clusters.counts.max() > 2

    def block_by_hand(block, x):
        attention, mlp = block.attention, block.mlp
        heads, width = attention.num_attention_heads, attention.head_dim
        normed, bias = block.layernorm_before(x), 0
        merged = clusters.merge(normed)
        if attention.sequence_reduction_ratio > 1:
            few = attention.sequence_reduction(normed, *grid)
        else:
            few, bias = merged, clusters.counts.log()[:, None, None]
        projections = ((attention.q_proj, merged), (attention.k_proj, few), (attention.v_proj, few))
        query, key, value = (proj(part).unflatten(-1, (heads, width)).transpose(1, 2) for proj, part in projections)
        weights = (query @ key.transpose(2, 3) * width**-0.5 + bias).softmax(-1)
        x = x + clusters.unmerge(attention.o_proj((weights @ value).transpose(1, 2).flatten(2)))
        hidden = clusters.unmerge(mlp.fc1(clusters.merge(block.layernorm_after(x))))
        hidden = clusters.merge(mlp.dwconv(hidden, *grid))
        return x + clusters.unmerge(mlp.fc2(mlp.activation_fn(hidden)))

    with torch.no_grad():
        for block in stage.blocks[1:]:
            tokens = block_by_hand(block, tokens)
        expected = stage.layer_norm(tokens)
    apply_ailurus(model, stages=(number,), cluster_location=1, num_clusters=6, clustering="local_kmeans")
    predict(model, images(), "model")
    torch.testing.assert_close(seen["output"].flatten(2).transpose(1, 2), expected)


@pytest.mark.parametrize("kind", CLASSES)
def test_nothing_changes_where_all_tokens_are_kept(kind):
    model = make(kind)
    before = predict(model, images(), kind)
    apply_ailurus(model, stages=(1, 2, 3, 4), cluster_location=0, keep_ratio=1.0)
    assert torch.equal(predict(model, images(), kind), before)


@pytest.mark.parametrize("kind", CLASSES)
def test_on_changes_off_restores_and_on_twice_is_on_once(kind, settings):
    model = make(kind)
    before = predict(model, images(), kind)  # transformers adds hooks of its own in the first forward
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    reduced = predict(apply_ailurus(model, **settings), images(), kind)
    assert not torch.allclose(reduced, before)
    assert torch.equal(predict(apply_ailurus(model, **settings), images(), kind), reduced)
    remove_ailurus(model)
    assert torch.equal(predict(model, images(), kind), before)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert not hasattr(model.config, "ailurus_config")


def test_an_image_gives_the_same_alone_and_in_a_batch(settings):
    model = apply_ailurus(make(), **settings)
    together = predict(model, images(3))
    for i in range(3):
        torch.testing.assert_close(predict(model, images(3)[i : i + 1])[0], together[i], rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_gives_equal_gradients(settings):
    gradients = []
    for checkpointing in (False, True):
        model = apply_ailurus(make(), **settings).train()
        if checkpointing:
            enable_checkpointing(model)
        # Two forwards before one backward: each has to be recomputed with its own clusters.
        outputs = [model(images(seed=seed)).logits.square().mean() for seed in (1, 2)]
        sum(outputs).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys() and len(plain) > 50
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=1e-4, atol=1e-6)


def test_it_compiles_whole_at_two_sizes():
    model = make("model", depths=[1, 1, 1, 1])
    apply_ailurus(model, stages=(3, 4), cluster_location=0, keep_ratio=0.4, clustering="local_kmeans")
    sizes = [(96, 160), (64, 96)]
    expected = [predict(model, images(size=size), "model") for size in sizes]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for size, before in zip(sizes, expected, strict=True):
        torch.testing.assert_close(predict(compiled, images(size=size), "model"), before, rtol=1e-4, atol=1e-4)


def test_half_precision(settings):
    model = apply_ailurus(make().bfloat16(), **settings)
    assert predict(model, images().bfloat16()).isfinite().all()


def test_status_and_saved_settings(tmp_path):
    model = apply_ailurus(make(), **EVERY_STAGE)
    expected = predict(model, images())
    status = ailurus_status(model)
    assert [location.num_tokens for location in status.locations] == [960, 240, 60, 15]
    assert [location.num_clusters for location in status.locations] == [384, 96, 24, 6]
    assert all(0 < location.flops_saved < 1 for location in status.locations) and "SegformerStage 3" in str(status)

    model.save_pretrained(tmp_path)
    again = AiluRusModelForSemanticSegmentation.from_pretrained(tmp_path).eval()
    assert torch.equal(predict(again, images()), expected)
    assert ailurus_status(again).config["stages"] == (1, 2, 3, 4)


def test_hidden_states_keep_their_shapes(settings):
    model = make()
    with torch.no_grad():
        before = model(images(), output_hidden_states=True).hidden_states
        after = apply_ailurus(model, **settings)(images(), output_hidden_states=True).hidden_states
    assert [state.shape for state in after] == [state.shape for state in before]


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"restore": "copy"}, "restore='residual'"),
        ({"cluster_location": 3}, "0 to 2"),
        ({"restore_location": 4}, "at most 3"),
        ({"stages": (5,)}, "1 to 4"),
        ({"cluster_location": (0, 1), "keep_ratio": (0.5, 0.2)}, "clustered once"),
    ],
)
def test_wrong_settings_name_the_number_and_leave_the_model_alone(fields, said):
    model = make()
    before = predict(model, images())
    with pytest.raises(AiluRusError, match=said):
        apply_ailurus(model, **{"cluster_location": 0, "keep_ratio": 0.5, **fields})
    assert torch.equal(predict(model, images()), before) and not ailurus_status(model).active


def test_stages_are_numbers_from_one():
    with pytest.raises(AiluRusError, match="stages"):
        AiluRusConfig(keep_ratio=0.5, stages=(0,))
