"""What is clustered, as plain loops in float64: slow, and short enough to be read against the description.

Density peaks over Eq. 1-3 of the paper, and the rounds of unions of `pairs` and `ward`.
"""

import math
from itertools import product

import numpy as np

from ailurus_hf.clustering.boruvka import CHAIN_PENALTY

# Grids, odd and of one and three dimensions too, and numbers of clusters.
GRIDS = [
    ((6, 8), 12),
    ((7, 5), 9),
    ((1, 9), 3),
    ((11, 1), 4),
    ((2, 2), 1),
    ((23, 30), 171),
    ((4, 6, 5), 13),
    ((3, 3), 9),
]


class Oracle:
    """One image, features [N, C] as numpy. `assignment` numbers clusters in ascending order of their center.

    `fragile`: some comparison was decided by less than `margin`, so float32 may decide it otherwise. A tie is certain
    only between values made of the same numbers: 10 * sqrt(8) = 20 * sqrt(2), but not in every precision.
    """

    def __init__(self, features, grid, num_clusters, lam=50, alpha=0.9, k=1, margin=1e-6):
        features = np.asarray(features, dtype=np.float64)
        cells = list(product(*(range(side) for side in grid)))
        count = len(cells)
        lam = min(lam, count - 1)
        self.margin, self.fragile = margin, False

        def grid_distance(i, j):
            return sum((a - b) ** 2 for a, b in zip(cells[i], cells[j], strict=True))

        def sigma(i, j):
            return math.sqrt(((features[i] - features[j]) ** 2).sum()) / math.sqrt(features.shape[1])

        weighted, made_of = [{} for _ in range(count)], [{} for _ in range(count)]
        for i in range(count):
            others = sorted((j for j in range(count) if j != i), key=lambda j: (grid_distance(i, j), j))
            for rank, j in enumerate(others[:lam] if lam else others, start=1):
                s = (1 - alpha) * rank / lam + alpha if lam else 1.0
                weighted[i][j] = sigma(i, j) * s
                made_of[i][j] = (sigma(i, j), s) if weighted[i][j] else 0

        log_rho, rho_made_of = [], []
        for i in range(count):
            nearest = sorted(weighted[i], key=weighted[i].get)[:k]
            log_rho.append(-sum(weighted[i][j] for j in nearest) / len(nearest) if nearest else 0.0)
            rho_made_of.append([made_of[i][j] for j in nearest])

        def denser(j, i):
            self._look(log_rho[j], log_rho[i], rho_made_of[j] == rho_made_of[i])
            return log_rho[j] > log_rho[i] or (log_rho[j] == log_rho[i] and j < i)

        def least(i, candidates):
            first, *rest = sorted(candidates, key=lambda j: (weighted[i][j], j))
            for other in rest[:1]:
                self._look(weighted[i][first], weighted[i][other], made_of[i][first] == made_of[i][other])
            return first

        parent, key, key_made_of = {}, [], []
        for i in range(count):
            candidates = [j for j in weighted[i] if denser(j, i)]
            if candidates:
                parent[i] = least(i, candidates)
                delta = weighted[i][parent[i]]
                key.append((0, log_rho[i] + (math.log(delta) if delta > 0 else -math.inf)))
                key_made_of.append((rho_made_of[i], made_of[i][parent[i]]))
            else:
                key.append((1, log_rho[i]))
                key_made_of.append(rho_made_of[i])

        best_first = sorted(range(count), key=lambda i: (-key[i][0], -key[i][1], i))
        self.centers = sorted(best_first[:num_clusters])
        for last_in, first_out in zip(best_first[num_clusters - 1 :], best_first[num_clusters:][:1], strict=False):
            if key[last_in][0] == key[first_out][0]:
                self._look(key[last_in][1], key[first_out][1], key_made_of[last_in] == key_made_of[first_out])
        chosen = set(self.centers)

        def own(i):
            if i in chosen:
                return i
            near = [j for j in weighted[i] if j in chosen]
            return least(i, near) if near else None

        owners = []
        for i in range(count):
            at = i
            while own(at) is None and at in parent:
                at = parent[at]
            owner = own(at)
            if owner is None:
                owner = min(self.centers, key=lambda c: (grid_distance(i, c), c))
            owners.append(owner)
        self.assignment = [self.centers.index(owner) for owner in owners]

    def _look(self, one, other, same):
        self.fragile |= not same and abs(one - other) < self.margin * (1 + abs(one))


def slow_unions(points, num_clusters, price, near, unions_of, clusters=None):
    """The partition of float64 [n, C] as sets of indices, and whether float32 could decide otherwise somewhere.

    price: of a squared distance of means and two sizes. near: whether clusters a and b may join. unions_of: of how many
    clusters there are, how many unions a round makes. clusters: to start from.
    """
    clusters, fragile = [frozenset([i]) for i in range(len(points))] if clusters is None else list(clusters), False

    def cost(a, b):
        difference = points[list(a)].mean(0) - points[list(b)].mean(0)
        return price(float(difference @ difference), len(a), len(b))

    while len(clusters) > num_clusters:
        partner, edges = {}, []
        for a in clusters:
            costs = sorted((cost(a, b), i) for i, b in enumerate(clusters) if b != a and near(a, b))
            partner[a] = clusters[costs[0][1]], costs[0][0]
            fragile |= len(costs) > 1 and costs[1][0] < costs[0][0] * (1 + 1e-5)
        for a in clusters:
            b, least = partner[a]
            if partner[b][0] != a:
                edges.append((least * CHAIN_PENALTY, a, b))
            elif clusters.index(a) > clusters.index(b):
                edges.append((least, a, b))
        edges.sort(key=lambda edge: edge[0])
        unions = unions_of(len(clusters))
        fragile |= len(edges) > unions and edges[unions][0] < edges[unions - 1][0] * (1 + 1e-5)
        for _, a, b in edges[:unions]:
            # Either may have joined another by now.
            holds_a, holds_b = (next(c for c in clusters if part <= c) for part in (a, b))
            clusters[clusters.index(holds_b)] = holds_a | holds_b
            clusters.remove(holds_a)
        clusters.sort(key=min)
    return set(clusters), fragile


def partition(assignment):
    """LongTensor[N] as a set of sets of indices."""
    return {frozenset((assignment == cluster).nonzero().flatten().tolist()) for cluster in assignment.unique()}
