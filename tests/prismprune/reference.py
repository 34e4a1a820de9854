"""ALGORITHM.md once more, in numpy and Python loops, one image at a time: what the library is held against.

It shares no code with the library. Sums are in float64 and rounded to float32 before they are compared, as
the library documents, so that values equal in exact arithmetic tie.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


def prism(
    attention: Array,
    features: Array,
    k: int,
    *,
    share: float = 0.5,
    factor: float | None = 4,
    start: str = "max_variance",
) -> tuple[list[int], list[int]]:
    """Salient and diverse raster indices of one image; attention [H, N] and features [N, d] in float64."""
    n = attention.shape[1]
    k = min(k, n)
    k_sal = math.floor(share * k + 1e-9)
    k_div = k - k_sal
    mean = attention.mean(axis=0).astype(np.float32)
    variance = attention.var(axis=0).astype(np.float32)
    salient = sorted(range(n), key=lambda i: (-mean[i], i))[:k_sal]
    m = n - k_sal if factor is None else min(math.floor(factor * k_div + 1e-9), n - k_sal)
    outside = [i for i in range(n) if i not in set(salient)]
    pool = sorted(sorted(outside, key=lambda i: (-variance[i], i))[:m])
    if k_div == 0:
        return sorted(salient), []
    distance = distances(features)
    picked = [first(distance, variance, pool, salient, start)]
    while len(picked) < k_div:
        rest = [i for i in pool if i not in picked]
        nearest = distance[np.ix_(rest, picked)].min(axis=1)
        picked.append(rest[int(np.flatnonzero(nearest == nearest.max())[0])])
    return sorted(salient), sorted(picked)


def first(distance: Array, variance: Array, pool: list[int], salient: list[int], start: str) -> int:
    """The token that FPS starts at."""
    if start == "most_isolated":
        gain = {i: min((distance[i, j] for j in pool if j != i), default=0) for i in pool}
    elif start == "farthest_from_salient" and salient:
        gain = {i: min(distance[i, j] for j in salient) for i in pool}
    else:
        gain = {i: variance[i] for i in pool}
    return min(pool, key=lambda i: (-gain[i], i))


def distances(features: Array) -> Array:
    """1 - cosine of each pair, in float32. Features of length zero have cosine 0 to all."""
    length = np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    unit = features / length
    return 1 - (unit @ unit.T).astype(np.float32)


def split(kept: int, candidates: list[int]) -> list[int]:
    """Largest remainder with fractions; ties to the earlier part."""
    quota = [Fraction(kept * part, sum(candidates)) for part in candidates]
    shares = [math.floor(q) for q in quota]
    while sum(shares) < kept:
        part = max(range(len(quota)), key=lambda i: (quota[i] - shares[i], -i))
        shares[part] += 1
    return shares
