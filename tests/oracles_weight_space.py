"""Formulas of posteriors over weights, retyped from the papers, without gpbridge."""

import math

import torch


def bezier(points, t):
    """Garipov et al. (NeurIPS 2018), section 3.2: Bernstein form, ``s x p``."""
    n = len(points) - 1
    rows = []
    for time in t.tolist():
        row = torch.zeros_like(points[0])
        for i, point in enumerate(points):
            row = row + math.comb(n, i) * (1 - time) ** (n - i) * time**i * point
        rows.append(row)
    return torch.stack(rows)


def poly_chain(points, t):
    """Garipov et al. (NeurIPS 2018), section 3.2: linear between neighbours."""
    pieces = len(points) - 1
    rows = []
    for time in t.tolist():
        i = min(int(time * pieces), pieces - 1)
        share = time * pieces - i
        rows.append((1 - share) * points[i] + share * points[i + 1])
    return torch.stack(rows)


def curve_rate(share):
    """Rate after a share of the run: Garipov et al., their public training script."""
    if share <= 0.5:
        return 1.0
    return 1 - 0.99 * (share - 0.5) / 0.4 if share <= 0.9 else 0.01
