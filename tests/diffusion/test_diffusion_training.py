"""Forwards that break off, run again in the backward, or run while something is switched; threads and keyboard."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from diffusion_models import NETWORKS, SETTINGS, latents, make_network, packed, predict
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from ailurus_hf import AiluRusError, apply_ailurus, remove_ailurus
from ailurus_hf.diffusion.apply import reducers_of

NAMES = ("UNet", "SDXL UNet", "PixArt", "SD3.5", "Flux", "Wan")
on_every_kind = pytest.mark.parametrize("name", NAMES)
in_both_scopes = pytest.mark.parametrize("scope", ["blocks", "attention"])


def gradients(network, name, batches=1):
    network.zero_grad()
    loss = 0
    for seed in range(batches):
        x, conditions = latents(NETWORKS[name].shape, seed=seed), NETWORKS[name].conditions(2)
        if name == "Flux":
            x, conditions["img_ids"] = packed(x)
        loss = loss + network(x, timestep=torch.full((2,), 5), **conditions, return_dict=False)[0].square().mean()
    # All at once: what runs again in the backward is of several forwards.
    loss.backward()
    return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


@on_every_kind
@pytest.mark.parametrize("reduce", ["qkv", "kv"])
def test_gradients_are_the_same_where_blocks_are_checkpointed(name, reduce):
    network = apply_ailurus(make_network(name), **SETTINGS, scope="attention", reduce=reduce).train()
    want = gradients(network, name, batches=2)
    network.enable_gradient_checkpointing()
    for _ in range(2):
        got = gradients(network, name, batches=2)
        assert got.keys() == want.keys()
        for key, value in want.items():
            torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5 * max(value.abs().max().item(), 1))
    remove_ailurus(network)
    assert not any("ailurus" in str(type(getattr(m, "_gradient_checkpointing_func", None))) for m in network.modules())
    gradients(network, name)


@pytest.mark.parametrize("name", ["UNet", "PixArt", "Flux"])
@in_both_scopes
def test_a_checkpoint_of_torchs_around_a_block_is_refused_in_words(name, scope):
    network = apply_ailurus(make_network(name), **SETTINGS, scope=scope).train()
    for stack in reducers_of(network)[0][1].stacks:
        apply_activation_checkpointing(stack.module, check_fn=lambda module, stack=stack: module in stack.blocks)
    with pytest.raises(AiluRusError, match="enable_gradient_checkpointing"):
        gradients(network, name)
    # And the next forward is right.
    want = predict(apply_ailurus(make_network(name), **SETTINGS, scope=scope), name, latents(NETWORKS[name].shape))
    torch.testing.assert_close(predict(network.eval(), name, latents(NETWORKS[name].shape)), want)


class Stop(Exception):
    pass


@on_every_kind
@in_both_scopes
def test_a_forward_that_breaks_off_leaves_nothing(name, scope):
    network, x = make_network(name), latents(NETWORKS[name].shape)
    want = predict(apply_ailurus(network, **SETTINGS, scope=scope), name, x)
    stack, seen = reducers_of(network)[0][1].stacks[0], []

    def stop(module, args, kwargs):
        seen.append(weakref.ref(args[0] if args else kwargs["hidden_states"]))
        raise Stop

    handle = stack.blocks[-1].register_forward_pre_hook(stop, with_kwargs=True)
    with pytest.raises(Stop):
        predict(network, name, x)
    handle.remove()
    gc.collect()
    assert seen[0]() is None and reducers_of(network)[0][1].forwards.current is None
    twin = copy.deepcopy(network)
    assert torch.equal(predict(network, name, x), want) and torch.equal(predict(twin, name, x), want)


def test_switching_in_the_middle_of_a_forward_is_refused():
    network, x = make_network("UNet"), latents((4, 8, 12))
    plain = predict(network, "UNet", x)
    want = predict(apply_ailurus(network, **SETTINGS), "UNet", x)
    block, inside, go = network.mid_block.attentions[0].transformer_blocks[0], threading.Event(), threading.Event()
    # In a hook of this thread.
    handle = block.register_forward_hook(lambda *_: [remove_ailurus(network), None][1])
    with pytest.raises(AiluRusError, match="UNet2DConditionModel is in a forward"):
        predict(network, "UNet", x)
    handle.remove()
    # In another thread.
    handle = block.register_forward_hook(lambda *_: [inside.set(), go.wait(60), None][-1])
    got = []
    thread = threading.Thread(target=lambda: got.append(predict(network, "UNet", x)))
    thread.start()
    assert inside.wait(60)
    for switch in (remove_ailurus, lambda network: apply_ailurus(network, keep_ratio=0.5)):
        with pytest.raises(AiluRusError, match="between forwards"):
            switch(network)
    go.set()
    thread.join()
    handle.remove()
    assert torch.equal(got[0], want)
    assert torch.equal(predict(remove_ailurus(network), "UNet", x), plain)


def test_a_forward_that_the_keyboard_interrupts_does_not_stay():
    network, x = make_network("UNet"), latents((4, 8, 12))
    want = predict(apply_ailurus(network, **SETTINGS), "UNet", x)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = network.mid_block.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        predict(network, "UNet", x)
    handle.remove()
    assert torch.equal(predict(network, "UNet", x), want)
    apply_ailurus(network, **SETTINGS)
    assert torch.equal(predict(network, "UNet", x), want)


@pytest.mark.parametrize("name, path", [("UNet", "mid_block.attentions.0"), ("PixArt", "transformer_blocks.1")])
@in_both_scopes
def test_a_part_called_outside_its_network_is_refused(name, path, scope):
    network = apply_ailurus(make_network(name), **SETTINGS, scope=scope)
    x = latents((32, 4, 6)) if name == "UNet" else latents((24, 16))
    with pytest.raises(AiluRusError, match="outside a forward of the network"):
        network.get_submodule(path)(x, encoder_hidden_states=torch.ones(2, 5, 16))
