"""Choosing points and arms, retyped from the papers: loops and dense inverses, float64.

Knows nothing of the library.
"""

import math

import torch


def mutual_information(probabilities):
    """H[mean] - mean H, entropy by entropy (Houlsby et al. 2011, eq. 2), ``n``."""

    def entropy(p):
        return -sum(float(v) * math.log(float(v)) for v in p if v > 0)

    s, n, _ = probabilities.shape
    found = []
    for i in range(n):
        whole = entropy(probabilities[:, i].mean(0))
        found.append(whole - sum(entropy(probabilities[j, i]) for j in range(s)) / s)
    return torch.tensor(found, dtype=torch.float64)


def bait_objective(pool, chosen, labelled=None, precision=1.0):
    """Trace of the inverse of what is known times the Fisher matrix of the pool."""
    n, _, p = pool.shape
    M = precision * torch.eye(p, dtype=torch.float64)
    for V in [] if labelled is None else labelled:
        M = M + V.T @ V
    for i in chosen:
        M = M + pool[i].T @ pool[i]
    F = sum(V.T @ V for V in pool) / n
    return float(torch.trace(torch.linalg.inv(M) @ F))


def bait(pool, q, labelled=None, precision=1.0, oversample=2.0):
    """Greedy forward, then greedy backward, with the objective computed anew."""

    def value(chosen):
        return bait_objective(pool, chosen, labelled, precision)

    chosen = []
    while len(chosen) < min(math.ceil(oversample * q), len(pool)):
        rest = [i for i in range(len(pool)) if i not in chosen]
        chosen.append(min(rest, key=lambda i: value([*chosen, i])))
    while len(chosen) > q:
        dropped = min(chosen, key=lambda i: value([j for j in chosen if j != i]))
        chosen.remove(dropped)
    return chosen
