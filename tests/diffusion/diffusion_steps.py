"""Steps of a picture whose latents change a little, and what is true of them with some steps on all tokens."""

import torch
from diffusion_models import SETTINGS, make_network, predict
from diffusion_ways import sample
from traces import traces

from ailurus_hf import apply_ailurus, remove_ailurus
from ailurus_hf.diffusion import denoising

STEPS = (9, 8, 7, 6)


def picture(name, step, seed=0, batch=2):
    """Latents that change a little from step to step."""
    return sample(name, batch=batch, seed=seed) + 0.05 * step * sample(name, batch=batch, seed=seed + 7)


def run(network, name, seed=0, batch=2, steps=STEPS, **kwargs):
    """What a network predicts in each step of a picture."""
    with denoising(network):
        return [predict(network, name, picture(name, n, seed, batch), t, **kwargs) for n, t in enumerate(steps)]


def plain_run(network, name, **kwargs):
    return [predict(network, name, picture(name, n), t, **kwargs) for n, t in enumerate(STEPS)]


def same(got, want, tolerance=1e-5):
    return all(
        torch.allclose(a, b, rtol=tolerance, atol=tolerance * b.abs().max()) for a, b in zip(got, want, strict=True)
    )


def distance(one, other):
    return ((one - other).norm() / other.norm()).item()


def check(name, **way):
    """Full steps are plain, those between nearer to it than without; another picture leaves nothing, undone all is."""
    network = make_network(name)
    plain, before = plain_run(network, name), traces(network)
    every_step = {n: v for n, v in way.items() if n not in {"extrapolate", "between"}}
    alone = run(apply_ailurus(network, **SETTINGS, **every_step), name)
    apply_ailurus(network, **SETTINGS, **way, full_every=2)
    kept = run(network, name)
    assert same(kept[::2], plain[::2]) and not same(alone[::2], plain[::2], 1e-3)
    assert all(x.isfinite().all() for x in kept) and not same(kept[1::2], plain[1::2], 1e-4)
    assert all(distance(kept[n], plain[n]) < distance(alone[n], plain[n]) for n in (1, 3))
    run(network, name, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(run(network, name), kept, strict=True))
    remove_ailurus(network)
    assert all(torch.equal(a, b) for a, b in zip(plain_run(network, name), plain, strict=True))
    assert traces(network) == before


def additions(network, name, **fields):
    """What the first stack adds to each token in each step."""
    path = {"UNet": "down_blocks.0.attentions.0.", "SDXL UNet": "down_blocks.1.attentions.0.", "PixArt": ""}[name]
    blocks, seen = network.get_submodule(f"{path}transformer_blocks"), []
    # Hooks that were there before see all tokens.
    blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    blocks[-1].register_forward_hook(lambda module, args, out: seen.append(out))
    run(apply_ailurus(network, **{**SETTINGS, **fields}), name)
    return [after - before for before, after in zip(seen[::2], seen[1::2], strict=True)]
