"""Is it right on this device? Clusters, merging, attention, identity, undo, no waiting: a row a check.

Clusters of density peaks are held against the tests' plain loops, those of the other clusterings against the CPU's.
What only CUDA has is skipped elsewhere, and says so.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from ailurus_hf import ailurus_enabled, count_weighted_attention, spatial_density_peaks
from ailurus_hf.clustering import Clustering, LocalKMeans, clustering_names, get_clustering

from ..clustering.launch_modes import as_graph
from ..harness import ROOT

COLUMNS = {"check": "check", "holds": "holds", "note": "note"}
HALF = (torch.float16, torch.bfloat16)
# Grids and numbers of clusters, and what is compared of them: few pairs, many, and a clip.
GRIDS = (((12, 16), 48), ((32, 32), 256), ((64, 64), 1024), ((4, 12, 16), 192))
TINY_GRIDS = (((4, 6), 6), ((2, 4, 4), 8))
# Of the pairs of tokens that share a cluster on either device; rounding decides between means that are as near.
LEAST_SHARED = 0.99
# Numbers nearer to each other than this, relatively, float32 need not tell apart.
MARGIN = 1e-5


@dataclass(frozen=True)
class Check:
    """run: raises where it does not hold; what it returns is a note. cuda: it says nothing elsewhere."""

    name: str
    run: Callable[[], str | None]
    cuda: bool = False


def hold(checks: Iterator[Check], device: torch.device) -> list[dict[str, Any]]:
    """A row a check: `holds` True or False, or None where it was skipped."""
    rows = []
    for check in checks:
        holds, note = None, "only CUDA has this"
        if not check.cuda or device.type == "cuda":
            try:
                note, holds = check.run() or "", True
            except Exception as error:  # a check that cannot run is one that does not hold
                note, holds = f"{type(error).__name__}: {error}".strip().splitlines()[0], False
        rows.append({"check": check.name, "holds": holds, "note": note})
    return rows


@torch.no_grad()
def measure_clustering(device: torch.device, tiny: bool = False) -> list[dict[str, Any]]:
    """Clusters, merging and attention."""
    return hold(_of_clustering(device, TINY_GRIDS if tiny else GRIDS), device)


@torch.no_grad()
def measure_models(device: torch.device, tiny: bool = False) -> list[dict[str, Any]]:
    """A reduced ViT, with every clustering."""
    sizes = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 384}
    torch.manual_seed(0)
    config = ViTConfig(**sizes, image_size=128 if tiny else 512, patch_size=16)
    model = ViTModel(config, add_pooling_layer=False).eval().to(device)
    images = torch.randn(3, 2, 3, config.image_size, config.image_size, device=device)
    fields = {"cluster_location": 1, "keep_ratio": 0.25}

    def forward(x: Tensor) -> Tensor:
        return model(x).last_hidden_state

    return hold(_of_model(model, forward, images, fields, "ViT"), device)


@torch.no_grad()
def measure_diffusion(device: torch.device, tiny: bool = False) -> list[dict[str, Any]]:
    """A reduced UNet of Stable Diffusion's kind, with every clustering."""
    from ..diffusion import diffusion_speed

    unet = diffusion_speed.make_unet("sd15", device, torch.float32)
    size = 256 if tiny else 512
    given = diffusion_speed.inputs_for(unet, "sd15", size, 2)[0]
    images = torch.randn(3, *given["sample"].shape, generator=torch.Generator().manual_seed(0)).to(device)

    def forward(x: Tensor) -> Tensor:
        return diffusion_speed.step_of(unet, {**given, "sample": x})

    return hold(_of_model(unet, forward, images, {"keep_ratio": 0.25, "refresh_every": 1}, "UNet"), device)


def _of_clustering(device: torch.device, grids: tuple) -> Iterator[Check]:
    yield Check("density peaks are the plain loops'", lambda: _as_plain_loops(device, *grids[0]))
    for name in clustering_names():
        for grid, count in grids:
            about = f"{' × '.join(map(str, grid))} → {count}"
            yield Check(
                f"{name} as on the CPU, {about}", lambda n=name, g=grid, c=count: _as_on_the_cpu(device, n, g, c)
            )
        yield Check(f"{name} waits for nothing", lambda n=name: _no_waiting(device, n, *grids[-2]), cuda=True)
    if importlib.util.find_spec("triton") is not None:
        kernel = LocalKMeans(kernel="triton")
        for grid, count in grids:
            name = f"local_kmeans by Triton as by torch, {' × '.join(map(str, grid))} → {count}"
            yield Check(name, lambda g=grid, c=count: _as_by_torch(device, kernel, g, c), cuda=True)
        name = "local_kmeans by Triton waits for nothing"
        yield Check(name, lambda: _no_waiting(device, kernel, *grids[-2]), cuda=True)
    yield Check("merge and unmerge are plain means", lambda: _plain_means(device, *grids[1]))
    for dtype in (torch.float32, *HALF):
        for form in ("mask", "channel"):
            name = f"{form} form weighs as equal tokens, {str(dtype).removeprefix('torch.')}"
            yield Check(name, lambda d=dtype, f=form: _weighs_as_equal_tokens(device, d, f))


def _of_model(
    model: nn.Module, forward: Callable[[Tensor], Tensor], images: Tensor, fields: dict[str, Any], name: str
) -> Iterator[Check]:
    device = images.device
    plain = forward(images[0])

    def reduced(clustering: str) -> str:
        with ailurus_enabled(model, **fields, clustering=clustering):
            output = forward(images[0])
        assert output.isfinite().all(), "not finite"
        assert not torch.equal(output, plain), "as without reduction"
        return f"cosine {torch.cosine_similarity(output.flatten(1), plain.flatten(1)).mean():.3f}"

    def kept_whole() -> str:
        with ailurus_enabled(model, **{**fields, "keep_ratio": 1.0}):
            far = ((forward(images[0]) - plain).abs().max() / plain.abs().max()).item()
        assert far <= 1e-5, f"differs by {far:.1e}"
        return f"differs by {far:.1e}"

    def undone() -> None:
        with ailurus_enabled(model, **fields):
            forward(images[0])
        assert torch.equal(forward(images[0]), plain), "differs after remove_ailurus"

    def waits_for_nothing(clustering: str) -> None:
        with ailurus_enabled(model, **fields, clustering=clustering):
            forward(images[0])
            with waiting_raises():
                forward(images[1])

    def as_one_graph(clustering: str) -> str:
        with ailurus_enabled(model, **fields, clustering=clustering):
            want = forward(images[1])
            got = as_graph(forward, images[0])(images[1])
            far = ((got - want).abs().max() / want.abs().max()).item()
        assert far <= 1e-3, f"differs by {far:.1e}"
        return f"differs by {far:.1e}"

    yield Check(f"{name} with all tokens kept is the plain one", kept_whole)
    yield Check(f"{name} is undone bit for bit", undone)
    for clustering in clustering_names():
        yield Check(f"{name} reduced, {clustering}", lambda c=clustering: reduced(c))
    for clustering in clustering_names() if device.type == "cuda" else ("any clustering",):
        yield Check(f"{name} waits for nothing, {clustering}", lambda c=clustering: waits_for_nothing(c), cuda=True)
        yield Check(f"{name} is one CUDA graph, {clustering}", lambda c=clustering: as_one_graph(c), cuda=True)


@contextmanager
def waiting_raises() -> Iterator[None]:
    """In here CUDA raises where the host waits for it."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def random_tokens(grid: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(1, math.prod(grid), 16, generator=torch.Generator().manual_seed(seed))


def _as_plain_loops(device: torch.device, grid: tuple[int, ...], count: int) -> str:
    compared = 0
    for seed in range(8):
        x = random_tokens(grid, seed)
        want = _oracle()(x[0].numpy(), grid, count, margin=MARGIN)
        if want.fragile:  # decided by less than float32 holds
            continue
        found = spatial_density_peaks(x.to(device), grid, count)
        assert found.centers is not None and found.centers[0].tolist() == want.centers, f"other centers, seed {seed}"
        assert found.assignment[0].tolist() == want.assignment, f"other assignment, seed {seed}"
        compared += 1
    assert compared, "no draw that float32 can tell"
    return f"{compared} draws"


def _oracle() -> Any:
    """The tests' plain loops, by their file: tests are no package."""
    if "ailurus_oracle" not in sys.modules:
        spec = importlib.util.spec_from_file_location("ailurus_oracle", ROOT / "tests" / "helpers" / "oracle.py")
        assert spec is not None and spec.loader is not None
        sys.modules["ailurus_oracle"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["ailurus_oracle"].Oracle


def _as_on_the_cpu(device: torch.device, name: str, grid: tuple[int, ...], count: int) -> str:
    x, clustering = random_tokens(grid), get_clustering(name)
    return _share_pairs(*(clustering(x.to(where), grid, count).assignment[0].cpu() for where in (device, "cpu")))


def _as_by_torch(device: torch.device, kernel: Clustering, grid: tuple[int, ...], count: int) -> str:
    x, clusterings = random_tokens(grid).to(device), (kernel, get_clustering("local_kmeans"))
    return _share_pairs(*(clustering(x, grid, count).assignment[0] for clustering in clusterings))


def _share_pairs(here: Tensor, there: Tensor) -> str:
    """Holds two assignments, LongTensor[N], against each other."""
    pairs = [assignment[:, None] == assignment for assignment in (here, there)]
    shared = ((pairs[0] & pairs[1]).sum() / (pairs[0] | pairs[1]).sum()).item()
    assert shared >= LEAST_SHARED, f"{shared:.1%} of the pairs"
    return f"{shared:.1%} of the pairs"


def _no_waiting(device: torch.device, name: str | Clustering, grid: tuple[int, ...], count: int) -> None:
    x, clustering = random_tokens(grid).to(device), get_clustering(name)

    def run() -> None:
        clusters = clustering(x, grid, count)
        clusters.unmerge(clusters.merge(x))

    run()
    with waiting_raises():
        run()


def _plain_means(device: torch.device, grid: tuple[int, ...], count: int) -> None:
    x = random_tokens(grid).to(device)
    clusters = get_clustering("local_kmeans")(x, grid, count)
    merged = clusters.merge(x)
    member = nn.functional.one_hot(clusters.assignment, count).float()
    means = member.transpose(1, 2) @ x / clusters.counts.clamp(min=1)[..., None]
    torch.testing.assert_close(merged, means, rtol=1e-4, atol=1e-4)
    assert torch.equal(clusters.merge(x), merged), "not the same twice"
    assert torch.equal(clusters.unmerge(merged)[0], merged[0][clusters.assignment[0]]), "unmerge"


def _weighs_as_equal_tokens(device: torch.device, dtype: torch.dtype, form: str) -> str:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 3, 40, 64, generator=generator).to(device, dtype) for _ in range(3))
    counts = torch.randint(1, 6, (1, 40), generator=generator)
    repeated = [each.float().repeat_interleave(counts[0].to(device), 2) for each in (key, value)]
    want = (query.float() @ repeated[0].transpose(-1, -2) * 64**-0.5).softmax(-1) @ repeated[1]
    got = count_weighted_attention(query, key, value, counts.to(device), form=form).float()
    far, most = (got - want).abs().max().item(), 1e-4 if dtype == torch.float32 else 3e-2
    assert far <= most, f"differs by {far:.1e}"
    return f"differs by {far:.1e}"
