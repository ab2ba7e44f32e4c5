"""Gram matrices of infinitely wide networks, against neural-tangents and BoTorch.

A network of three dense layers and two ReLUs on n = 2000 standard normal inputs of 10
columns; the matrix, and the gradient of a weighted sum of its entries in the variances
of all weights and biases and in the inputs. neural-tangents is compiled beforehand by
``jax.jit`` and limited to one thread as we are; without it only BoTorch's kernel is
compared, which has no tangent kernel and shares the variances of its layers.
Run with ``python benchmarks/bench_infinite_width.py [--smoke]``.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable

import timing
import torch
from botorch.models.kernels import InfiniteWidthBNNKernel
from torch import Tensor

from gpbridge.kernels import InfiniteWidthKernel
from gpbridge.kernels.wide_layers import Dense, ReLU

FOUND = all(map(importlib.util.find_spec, ("jax", "neural_tangents")))
if FOUND:
    os.environ["XLA_FLAGS"] = (
        "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    )
    import jax
    from neural_tangents import stax

    jax.config.update("jax_enable_x64", True)

WEIGHT, BIAS = 1.9, 0.05
Pair = tuple[Callable[[], Tensor], Callable[[], list[Tensor]]]


def torch_side(kernel: torch.nn.Module, X: Tensor, weights: Tensor) -> Pair:
    """The matrix, and gradients in inputs and hyperparameters."""
    leaf = X.clone().requires_grad_()
    leaves = [leaf, *kernel.parameters()]

    def value() -> Tensor:
        with torch.no_grad():
            return kernel(X).to_dense()

    def gradient() -> list[Tensor]:
        total = (kernel(leaf).to_dense() * weights).sum()
        return list(torch.autograd.grad(total, leaves))

    return value, gradient


def jax_side(kind: str, X: Tensor, weights: Tensor) -> Pair:
    """The same by neural-tangents; its variances enter as their square roots."""
    dtype = X.numpy().dtype
    x, g = jax.numpy.asarray(X.numpy()), jax.numpy.asarray(weights.numpy())
    w, b = (jax.numpy.full(3, v, dtype) for v in (WEIGHT, BIAS))

    def matrix(x, w, b):
        w, b = jax.numpy.sqrt(w), jax.numpy.sqrt(b)
        layers = [stax.Dense(1, W_std=w[0], b_std=b[0])]
        for i in (1, 2):
            layers += [stax.Relu(), stax.Dense(1, W_std=w[i], b_std=b[i])]
        return stax.serial(*layers)[2](x, None, kind)

    def total(x, w, b, g):
        return (matrix(x, w, b) * g).sum()

    compiled = jax.jit(matrix)
    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    return (
        lambda: jax.block_until_ready(compiled(x, w, b)),
        lambda: jax.block_until_ready(gradient(x, w, b, g)),
    )


def our_kernel(kind: str, dtype: torch.dtype) -> InfiniteWidthKernel:
    """Three dense layers."""
    layers = [Dense(WEIGHT, BIAS), ReLU(), Dense(WEIGHT, BIAS), ReLU()]
    kernel = InfiniteWidthKernel([*layers, Dense(WEIGHT, BIAS)], kind).to(dtype)
    kernel.weight_variance, kernel.bias_variance = WEIGHT, BIAS
    return kernel


def rows(
    kind: str, dtype: torch.dtype, n: int, repeats: int
) -> tuple[list[timing.Row], list[str]]:
    """Values and gradients of one kernel, and how far the peers' are apart."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(n, 10, generator=generator, dtype=dtype)
    weights = torch.randn(n, n, generator=generator, dtype=dtype)
    peers: dict[str, Pair] = {}
    if FOUND:
        peers["neural-tangents"] = jax_side(kind, X, weights)
    if kind == "nngp":
        botorch = InfiniteWidthBNNKernel(depth=2).to(dtype)
        botorch.weight_var, botorch.bias_var = WEIGHT, BIAS
        peers["BoTorch"] = torch_side(botorch, X, weights)
    ours = torch_side(our_kernel(kind, dtype), X, weights)
    precision = "float64" if dtype == torch.float64 else "float32"
    table, notes = [], []
    for i, what in enumerate(("matrix", "matrix and gradient")):
        sides = {"ours": ours[i], **{name: pair[i] for name, pair in peers.items()}}
        times = timing.interleave(sides, repeats)
        for name in peers:
            target = 1.0 if name == "neural-tangents" or not FOUND else None
            work = f"{kind} {what}, n={n}, {precision}"
            table.append(timing.compare(work, name, times["ours"], times[name], target))
    ours_now = [t.double() for t in (ours[0](), ours[1]()[0])]
    for name, pair in peers.items():
        theirs = [
            torch.as_tensor(t.tolist()).double() for t in (pair[0](), pair[1]()[0])
        ]
        apart = [
            f"{(a - b).abs().max() / b.abs().max():.1e}"
            for a, b in zip(ours_now, theirs, strict=True)
        ]
        notes.append(
            f"- {kind}, {precision}, {name}: largest difference {apart[0]} of the "
            f"largest entry of the matrix, {apart[1]} of the gradient in the inputs"
        )
    return table, notes


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one repeat")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    timing.one_thread()
    n, repeats = (30, 1) if arguments.smoke else (2000, arguments.repeats)
    table, notes = [], []
    for dtype in (torch.float64, torch.float32):
        for kind in ("nngp", "ntk"):
            found = rows(kind, dtype, n, repeats)
            table += found[0]
            notes += found[1]
    timing.print_rows("Gram matrix of infinitely wide networks", table, notes)


if __name__ == "__main__":
    main()
