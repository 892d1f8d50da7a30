"""AiluRus in one file: a vision transformer whose later layers run on M of its N tokens (arXiv 2311.01197).

A ViT spends as much on a patch of plain sky as on one that a contour crosses. AiluRus looks at the tokens once, at the
output of layer L: those that are alike and near each other join one of M clusters, later layers see one representative
per cluster, and in the end each token gets its representative's value. Nothing is trained.

    python examples/minimal_ailurus.py

It reads from top to bottom, in the paper's symbols. In the package the same is `AiluRusConfig.paper(L, M)`.
"""

import math
import re
import time
from functools import lru_cache, partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# 1. Which tokens belong together: spatial-aware density-peak clustering (section 3.2).

# Not by matrix products, whose rounding would put equal tokens apart and break ties.
euclidean = partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")


@lru_cache  # it depends on the grid alone, so pictures of one size share it
def spatial_neighbors(grid: tuple[int, ...], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest cells of each, in order of index, their ranks (1 is nearest), and all distances on the grid."""
    cells = torch.cartesian_prod(*(torch.arange(side).float() for side in grid))
    distance = euclidean(cells, cells)
    near, rank = distance.argsort(dim=1, stable=True)[:, 1 : count + 1].sort(dim=1)  # the first is the cell itself
    return near, rank + 1.0, distance


@torch.no_grad()  # the choice has no gradient; the mean that follows it has
def spatial_density_peaks(z: Tensor, grid: tuple[int, ...], M: int, lam=50, alpha=0.9, k=1) -> tuple[Tensor, Tensor]:
    """One picture's tokens z [N, C], on a grid of N cells, in M clusters: the cluster of each [N], the centers [M]."""
    i = torch.arange(len(z), device=z.device)
    near, rank, on_grid = (t.to(z.device) for t in spatial_neighbors(grid, min(lam or len(z), len(z) - 1)))
    # s is infinite past the λ nearest cells, so σ·s is computed for those alone, [N, λ]. λ = 0: all pairs, and no s.
    s = (1 - alpha) * rank / near.shape[1] + alpha if lam else 1.0  # Eq. 2
    sigma = euclidean(z.float()[:, None], z.float()[near])[:, 0] / math.sqrt(z.shape[1])
    d = sigma * s

    # A good center is dense, which is to have neighbors much like it, and far from whatever is denser.
    log_rho = -d.topk(min(k, near.shape[1]), largest=False).values.mean(1)  # Eq. 1 as a logarithm: ρ may round to 0
    denser = (log_rho[near] > log_rho[:, None]) | ((log_rho[near] == log_rho[:, None]) & (near < i[:, None]))
    delta, which = d.masked_fill(~denser, math.inf).min(1)  # Eq. 3
    parent, peak = near[i, which], ~denser.any(1)

    # The M largest ρ·δ. Where δ is infinite ρ decides. These sorts are stable: what is still equal goes by index.
    order = torch.where(peak, log_rho, 0).argsort(descending=True, stable=True)
    order = order[(log_rho + delta.log())[order].argsort(descending=True, stable=True)]
    centers = order[:M].sort().values

    # A center stays with itself; another token joins the closest center among its neighbors.
    is_center = torch.zeros_like(peak).index_fill(0, centers, True)
    owner = torch.where(is_center, i, near[i, d.masked_fill(~is_center[near], math.inf).argmin(1)])
    settled = is_center | is_center[near].any(1)
    # One without any follows its closest denser neighbor, and that one's, to a token that has one (a pass doubles the
    # steps walked). Where the way ends at a peak that is no center, the center nearest on the grid takes the token.
    step = torch.where(settled | peak, i, parent)
    for _ in range(len(z).bit_length()):
        step = step[step]
    owner = torch.where(settled[step], owner[step], centers[on_grid[:, centers].argmin(1)])
    return (is_center.cumsum(0) - 1)[owner], centers


# 2. From N tokens to M representatives, and back.


def merge(x: Tensor, clusters: Tensor, counts: Tensor) -> Tensor:
    """The mean of each cluster: x [B, N, C], clusters [B, N], counts [B, M] to [B, M, C]."""
    sums = x.new_zeros(*counts.shape, x.shape[-1]).scatter_add(1, clusters[..., None].expand_as(x), x)
    return sums / counts[..., None]


def unmerge(y: Tensor, clusters: Tensor) -> Tensor:
    """For each token a copy of its representative: y [B, M, C], clusters [B, N] to [B, N, C]."""
    return y.gather(1, clusters[..., None].expand(-1, -1, y.shape[-1]))


# 3. Attention in which a representative of m tokens weighs as they did: m · exp(q·k) = exp(q·k + log m).


def count_weighted_attention(q: Tensor, k: Tensor, v: Tensor, counts: Tensor | None) -> Tensor:
    """Eq. 5: q, k, v [B, heads, tokens, D], counts [B, tokens]. A bias per key is all it takes."""
    bias = None if counts is None else counts.log()[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


# 4. A plain ViT. Of its lines only those on clusters and counts are AiluRus's; its weights stay as they were trained.


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.layernorm_before, self.layernorm_after = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, counts: Tensor | None = None) -> Tensor:
        y = self.layernorm_before(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        x = x + self.out(count_weighted_attention(q, k, v, counts).transpose(1, 2).flatten(2))
        return x + self.mlp(self.layernorm_after(x))


class ViT(nn.Module):
    def __init__(self, grid=(45, 60), width=192, depth=8, heads=3, patch=16):
        super().__init__()
        self.grid, self.projection = grid, nn.Conv2d(3, width, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position_embeddings = nn.Parameter(torch.randn(1, 1 + math.prod(grid), width) * 0.02)
        self.layer = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.layernorm = nn.LayerNorm(width)

    def forward(self, pictures: Tensor, L: int = 0, M: int | None = None) -> Tensor:
        """Pictures [B, 3, height, width] to patch tokens [B, N, C]; given M, layers after the L-th run on M tokens."""
        assert M is None or 0 <= L < len(self.layer), (
            f"L = {L} leaves none of {len(self.layer)} layers to run on M tokens"
        )
        x = self.projection(pictures)
        grid, positions = tuple(x.shape[2:]), self.position_embeddings[:, 1:].mT.unflatten(2, self.grid)
        x = x + F.interpolate(positions, grid, mode="bilinear")  # trained on one grid, used on any
        first = (self.cls_token + self.position_embeddings[:, :1]).expand(len(x), -1, -1)
        x, clusters, counts = torch.cat([first, x.flatten(2).mT], 1), None, None

        for index, layer in enumerate(self.layer):
            if M is not None and index == L:  # x is the output of layer L, or of the embeddings where L = 0
                first, x = x[:, :1], x[:, 1:]  # the class token has no cell on the grid: no cluster, and a count of 1
                M = min(M, x.shape[1])
                clusters = torch.stack([spatial_density_peaks(z, grid, M)[0] for z in x])
                counts = F.one_hot(clusters, M).sum(1).to(x.dtype)
                x, counts = torch.cat([first, merge(x, clusters, counts)], 1), F.pad(counts, (1, 0), value=1)
            x = layer(x, counts)
        x = self.layernorm(x)[:, 1:]
        return x if clusters is None else unmerge(x, clusters)


# 5. What it costs and what it saves: on a street, with weights trained on streets, where both can be read.

if __name__ == "__main__":
    torch.manual_seed(0)
    vit, picture = ViT().eval(), F.interpolate(torch.rand(1, 3, 6, 8) * 2 - 1, (240, 320), mode="bilinear")
    try:
        from PIL import Image
        from safetensors.torch import load_file

        assets = Path(__file__).parent / "assets"
        image = Image.open(assets / "street.jpg").resize((960, 720))
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, 720, 960, 3)
        picture = pixels.permute(0, 3, 1, 2) / 127.5 - 1
        weights = {}
        for name, weight in load_file(assets / "segmenter-camvid/model.safetensors").items():
            name = re.sub(r"^encoder\.(encoder\.)?|(patch_)?embeddings\.|attention\.attention\.", "", name)
            name = name.replace("attention.output.dense", "out").replace("intermediate.dense", "mlp.0")
            weights[name.replace("output.dense", "mlp.2")] = weight
        vit.load_state_dict({name: weight for name, weight in weights.items() if not name.startswith("decoder")})
    except (ImportError, FileNotFoundError) as missing:
        print(f"a made-up picture and random weights: {missing}")

    @torch.inference_mode()
    def run(**reduction) -> tuple[float, Tensor]:
        start = time.perf_counter()
        tokens = vit(picture, **reduction)
        return time.perf_counter() - start, tokens

    N = math.prod(side // 16 for side in picture.shape[2:])
    L, M = 2, N // 4
    rounds = [(run(), run(L=L, M=M)) for _ in range(6)][1:]  # in turn, and the first round only warms up
    plain, reduced = (median(seconds for seconds, _ in runs) for runs in zip(*rounds))
    cosine = F.cosine_similarity(rounds[0][0][1], rounds[0][1][1], dim=-1)
    print(f"N = {N} tokens, M = {M} after layer {L} of {len(vit.layer)}")
    print(f"plain {plain * 1000:.0f} ms, reduced {reduced * 1000:.0f} ms: {plain / reduced:.2f}x")
    print(f"cosine between the outputs: {cosine.mean():.3f} on average, {cosine.quantile(0.05):.3f} for the worst 5 %")
