"""Spatial-aware density peaks as plain loops over Eq. 1-3 in float64: slow, and short enough to be read against them."""

import math
from itertools import product

import numpy as np


class Oracle:
    """One image, features [N, C] as numpy. `assignment` numbers clusters in ascending order of their centre.

    `fragile`: some comparison was decided by less than `margin` (but not equal), so float32 may decide it otherwise.
    """

    def __init__(self, features, grid, num_clusters, lam=50, alpha=0.9, k=1, margin=1e-6):
        features = np.asarray(features, dtype=np.float64)
        places = list(product(*(range(side) for side in grid)))
        count = len(places)
        lam = min(lam, count - 1)
        self.margin, self.fragile = margin, False

        def grid_distance(i, j):
            return sum((a - b) ** 2 for a, b in zip(places[i], places[j], strict=True))

        def sigma(i, j):
            return math.sqrt(((features[i] - features[j]) ** 2).sum()) / math.sqrt(features.shape[1])

        weighted = [{} for _ in range(count)]
        for i in range(count):
            others = sorted((j for j in range(count) if j != i), key=lambda j: (grid_distance(i, j), j))
            for rank, j in enumerate(others[:lam] if lam else others, start=1):
                s = (1 - alpha) * rank / lam + alpha if lam else 1.0
                weighted[i][j] = sigma(i, j) * s

        log_rho = []
        for i in range(count):
            nearest = sorted(weighted[i].values())[:k]
            log_rho.append(-sum(nearest) / len(nearest) if nearest else 0.0)

        def denser(j, i):
            self._look(log_rho[j], log_rho[i])
            return log_rho[j] > log_rho[i] or (log_rho[j] == log_rho[i] and j < i)

        parent, key = {}, []
        for i in range(count):
            candidates = [(w, j) for j, w in weighted[i].items() if denser(j, i)]
            if candidates:
                delta, parent[i] = self._least(candidates)
                key.append((0, log_rho[i] + (math.log(delta) if delta > 0 else -math.inf)))
            else:
                key.append((1, log_rho[i]))

        best_first = sorted(range(count), key=lambda i: (-key[i][0], -key[i][1], i))
        self.centers = sorted(best_first[:num_clusters])
        for last_in, first_out in zip(best_first[num_clusters - 1 :], best_first[num_clusters:][:1], strict=False):
            if key[last_in][0] == key[first_out][0]:
                self._look(key[last_in][1], key[first_out][1])
        chosen = set(self.centers)

        def own(i):
            if i in chosen:
                return i
            near = [(w, j) for j, w in weighted[i].items() if j in chosen]
            return self._least(near)[1] if near else None

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

    def _least(self, candidates):
        first, *rest = sorted(candidates)
        for other in rest[:1]:
            self._look(first[0], other[0])
        return first

    def _look(self, one, other):
        if one != other:
            self.fragile |= abs(one - other) < self.margin * (1 + abs(one))
