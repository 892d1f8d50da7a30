"""How reduced networks run: in half precision, compiled, from two threads, and in training."""

import threading

import pytest
import torch
from diffusion_models import LATENTS, NETWORKS, SETTINGS, latents, make_network, predict
from diffusion_ways import WAYS, on_every_network_in_every_way, sample, text_of

from ailurus_hf import AiluRusError, apply_ailurus


def in_half_precision(network):
    """As `from_pretrained(dtype=torch.bfloat16)` leaves it: some parts stay in fp32."""
    network.to(torch.bfloat16)
    for path, module in network.named_modules():
        if path.split(".")[-1] in (network._keep_in_fp32_modules or ()):
            module.float()
    return network


@on_every_network_in_every_way
def test_half_precision(name, way):
    network, x = in_half_precision(make_network(name)), sample(name).to(torch.bfloat16)
    reduced = predict(apply_ailurus(network, **SETTINGS, **way), name, x)
    assert reduced.dtype == torch.bfloat16 and reduced.isfinite().all()
    exact = predict(apply_ailurus(make_network(name), **{**SETTINGS, **way}), name, sample(name))
    assert torch.cosine_similarity(reduced.float().flatten(), exact.flatten(), 0) > 0.9


@pytest.mark.parametrize(
    "name, way",
    [
        ("UNet", "blocks"),
        ("UNet", "attention"),
        ("SDXL UNet", "merged projections"),
        ("ControlNet", "blocks"),
        ("PixArt", "density peaks"),
        ("SD3.5", "blocks"),
        ("SD3.5", "attention"),
        ("Wan", "blocks"),
    ],
)
def test_compiles_to_one_graph_at_several_sizes(name, way):
    network = apply_ailurus(make_network(name), **SETTINGS, **WAYS[way])
    # Not "eager", which takes what no other backend does.
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager", dynamic=False)
    for size in (LATENTS, (16, 10)):
        if not NETWORKS[name].maps:
            size = (2 * size[0], 2 * size[1])
        for seed in (0, 1):
            x = latents((4, 3, *size) if name == "Wan" else (4, *size), seed=seed)
            with torch._dynamo.config.patch(error_on_recompile=seed == 1):
                got = predict(compiled, name, x)
            want = predict(network, name, x)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize("way", [WAYS["blocks"], WAYS["merged projections"]], ids=["blocks", "merged projections"])
def test_two_threads_share_a_network(way):
    network = apply_ailurus(make_network("UNet"), **SETTINGS, **way, refresh_every=2)
    inputs = [latents((4, *size), batch=1) for size in (LATENTS, (10, 6))]
    want = [predict(network, "UNet", x) for x in inputs]
    # Both forwards stand still inside a reduced stack until the other one is there.
    both = threading.Barrier(2, timeout=30)
    network.down_blocks[0].attentions[0].transformer_blocks[0].attn2.register_forward_hook(
        lambda *_: [both.wait(), None][1]
    )
    got = [None, None]

    def work(index):
        got[index] = predict(network, "UNet", inputs[index])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_training_through_reduced_blocks():
    gradients = []
    for way in (WAYS["blocks"], WAYS["merged projections"]):
        network = apply_ailurus(make_network("UNet"), **SETTINGS, **way).train()
        out = network(sample("UNet"), 5, encoder_hidden_states=text_of(network), return_dict=False)[0]
        out.square().mean().backward()
        gradients.append(network.conv_in.weight.grad)
        assert gradients[-1].abs().max() > 0
    network.enable_gradient_checkpointing()
    network.zero_grad()
    network(sample("UNet"), 5, encoder_hidden_states=text_of(network), return_dict=False)[0].square().mean().backward()
    torch.testing.assert_close(network.conv_in.weight.grad, gradients[1])
    apply_ailurus(network, **SETTINGS)
    with pytest.raises(AiluRusError, match="gradient checkpointing"):
        network(sample("UNet"), 5, encoder_hidden_states=text_of(network))
