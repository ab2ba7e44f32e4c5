"""Curvature of a two-layer tanh network and of one convolution, by loops, in float64.

Retyped from Eschenhagen et al. (2023), equations (12) and (16), and from the definition
of the generalised Gauss-Newton matrix. Imports nothing of gpbridge.
"""

import torch


def jacobian(network, X):
    """Derivatives of all outputs by all weights, ``n x m x p``, one at a time."""
    weights = list(network.parameters())
    rows = []
    for x in X:
        out = network(x[None])[0]
        rows.append(
            torch.stack(
                [
                    torch.cat(
                        [
                            g.reshape(-1)
                            for g in torch.autograd.grad(o, weights, retain_graph=True)
                        ]
                    )
                    for o in out
                ]
            )
        )
    return torch.stack(rows).detach()


def gauss_newton(J, hessians):
    """Sum of ``J_n' L_n J_n``, ``p x p``."""
    return sum(j.mT @ h @ j for j, h in zip(J, hessians, strict=True))


def softmax_hessians(logits):
    p = logits.softmax(-1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


def kronecker_of_two_layers(network, X, hessians):
    """KFAC of Linear, Tanh, Linear: one ``p x p`` block for each layer, weight + bias.

    Entries are in the order of the network's parameters.
    """
    first, second = network[0], network[2]
    W2 = second.weight.detach()
    A1 = A2 = G1 = G2 = 0.0
    n = len(X)
    for x, hessian in zip(X, hessians, strict=True):
        h = torch.tanh(first(x)).detach()
        a1 = torch.cat([x, torch.ones(1, dtype=x.dtype)])
        a2 = torch.cat([h, torch.ones(1, dtype=x.dtype)])
        back = W2 @ (1 - h**2).diag()  # m x hidden
        A1, A2 = A1 + a1.outer(a1) / n, A2 + a2.outer(a2) / n
        G1, G2 = G1 + back.mT @ hessian @ back, G2 + hessian
    blocks = []
    for A, G in ((A1, G1), (A2, G2)):
        o, i = len(G), len(A) - 1
        full = torch.kron(G, A)  # rows of [weight | bias], row by row
        where = torch.arange(o * (i + 1)).reshape(o, i + 1)
        order = torch.cat([where[:, :i].reshape(-1), where[:, i]])
        blocks.append(full[order[:, None], order])
    return torch.block_diag(*blocks)


def kronecker_of_convolution(inputs, signals, sharing):
    """KFAC at T positions: inputs ``n x T x i``, signals ``n x r x T x o``."""
    n, T, i = inputs.shape
    o = signals.shape[-1]
    A, G = torch.zeros(i, i).double(), torch.zeros(o, o).double()
    for a, g in zip(inputs, signals, strict=True):
        if sharing == "reduce":
            mean = a.mean(0)
            A += mean.outer(mean) / n
            for row in g:
                total = row.sum(0)
                G += total.outer(total)
        else:
            for t in range(T):
                A += a[t].outer(a[t]) / (n * T)
                for row in g:
                    G += row[t].outer(row[t])
    return torch.kron(G, A)
