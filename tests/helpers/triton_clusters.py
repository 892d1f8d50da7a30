"""Local k-means by Triton's interpreter: `python triton_clusters.py FILE` saves what it finds in each case.

For a process of its own, as TRITON_INTERPRET=1 has to be set before Triton is imported, and then holds for all of it.
"""

import copy
import math
import pickle
import sys

import torch

from ailurus_hf.clustering import LocalKMeans


def drawn(grid, channels, batch=2, seed=0):
    return torch.randn(batch, math.prod(grid), channels, generator=torch.Generator().manual_seed(seed))


def whole(grid, channels):
    """Few values, so that many tokens are equal; opposite images in one, so that their mean is exactly 0."""
    half = torch.randint(-1, 2, (2, math.prod(grid) // 2, channels), generator=torch.Generator().manual_seed(0))
    return torch.cat([half, -half], 1).float()


def two_regions():
    """Cells in the middle of a region lose all their tokens."""
    x = torch.zeros(1, 64, 4)
    x.view(1, 8, 8, 4)[:, :, 3:] = 1
    return x


def with_nan():
    x = drawn((6, 8), 4)
    x[1, 7, 2] = math.nan
    return x


# Features, grid, number of clusters, rounds.
CASES = {
    "a batch": (drawn((6, 8), 16, batch=3), (6, 8), 12, 3),
    "odd sides, a width that divides nothing": (drawn((7, 11), 37), (7, 11), 19, 3),
    "one channel": (drawn((5, 4), 1), (5, 4), 6, 2),
    "wider than a block": (drawn((3, 4), 4099, batch=1), (3, 4), 4, 2),
    "a column": (drawn((11, 1), 24), (11, 1), 4, 3),
    "one cluster": (drawn((3, 5), 8), (3, 5), 1, 2),
    "as many clusters as tokens": (drawn((3, 3), 8), (3, 3), 9, 2),
    "a clip": (drawn((3, 5, 4), 9), (3, 5, 4), 13, 3),
    "one round": (drawn((6, 8), 16), (6, 8), 12, 1),
    "bf16": (drawn((7, 9), 24).bfloat16(), (7, 9), 15, 3),
    "a large common part": (100 + drawn((6, 8), 24), (6, 8), 12, 3),
    "channels first": (drawn((1, 16), 48).transpose(1, 2), (6, 8), 12, 3),
    "equal tokens, ties": (whole((8, 8), 2), (8, 8), 16, 1),
    "all tokens equal": (torch.full((2, 48, 5), 0.3), (6, 8), 12, 3),
    "two regions": (two_regions(), (8, 8), 16, 3),
    "NaN": (with_nan(), (6, 8), 12, 2),
}


def ways(clustering):
    """The same clustering by other ways than a plain call; each has to give the same clusters."""

    def cluster(x):
        return clustering(x, (6, 8), 12)

    def under_autocast(x):
        with torch.autocast("cpu", torch.bfloat16):
            return cluster(x)

    return {
        "plain": cluster,
        "deep copy": lambda x: copy.deepcopy(clustering)(x, (6, 8), 12),
        "pickle": lambda x: pickle.loads(pickle.dumps(clustering))(x, (6, 8), 12),
        "compiled": torch.compile(cluster, fullgraph=True, backend="aot_eager"),
        "compiled, any batch": torch.compile(cluster, fullgraph=True, dynamic=True, backend="aot_eager"),
        "with a gradient asked for": lambda x: cluster(x.clone().requires_grad_()),
        "autocast": under_autocast,
    }


def main(path):
    found = {}
    for name, (x, grid, count, rounds) in CASES.items():
        clusters = LocalKMeans(num_rounds=rounds, kernel="triton")(x, grid, count)
        found[name] = (clusters.assignment, clusters.counts)
    x = CASES["a batch"][0]
    for name, way in ways(LocalKMeans(kernel="triton")).items():
        clusters = way(x)
        found[name] = (clusters.assignment, clusters.counts)
    torch.save(found, path)


if __name__ == "__main__":
    main(sys.argv[1])
