"""The tangent kernel's Gram matrix, against a dense Jacobian and one product.

The peer is what a careful user writes in five lines: ``vmap(jacrev)`` per sample, then
J J'. Ours contracts the layers' signals and never forms J. Tanh networks of 8 inputs.
Every call gets new inputs, because the kernel keeps the features of the last ones.
Run with ``python benchmarks/bench_gram.py [--smoke]``.
"""

from __future__ import annotations

import argparse
import itertools

import problems
import timing
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from gpbridge.kernels import NeuralTangentKernel


def dense_gram(network: nn.Module, X: Tensor) -> Tensor:
    """J J' from per-sample Jacobians, in the dtype of the inputs."""
    params = {name: p.detach() for name, p in network.named_parameters()}

    def outputs(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(network, params, (x,))

    blocks = vmap(jacrev(outputs), (None, 0))(params, X)
    J = torch.cat([block.flatten(2) for block in blocks.values()], -1)  # n x m x p
    J = J.flatten(0, 1)
    return J @ J.mT


def our_gram(kernel: NeuralTangentKernel, X: Tensor) -> Tensor:
    """The evaluated kernel."""
    with torch.no_grad():
        return kernel(X).to_dense()


def row(
    width: int,
    num_data: int,
    num_outputs: int,
    dtype: torch.dtype,
    repeats: int,
    target: float | None,
) -> tuple[timing.Row, str]:
    """One configuration, and how far the two matrices are apart."""
    network = problems.mlp((8, width, width, num_outputs)).to(dtype)
    X, *_ = problems.smooth_regression(num_data, 1, dtype)
    kernel = NeuralTangentKernel(network).to(dtype)
    theirs, ours = dense_gram(network, X), our_gram(kernel, X)
    error = (ours - theirs).abs().max() / theirs.abs().max()
    count = itertools.count(1)

    def fresh() -> Tensor:
        return X + 1e-3 * next(count)

    times = timing.interleave(
        {
            "ours": lambda: our_gram(kernel, fresh()),
            "dense": lambda: dense_gram(network, fresh()),
        },
        repeats,
    )
    precision = "float64" if dtype == torch.float64 else "float32"
    work = f"2x{width}, n={num_data}, m={num_outputs}, {precision}"
    result = timing.compare(
        work, "dense vmap(jacrev)", times["ours"], times["dense"], target
    )
    return result, f"- {work}: largest difference {error:.1e} of the largest entry"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one repeat")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    timing.one_thread()
    sizes = [(50, 1000, 1, 6.0), (50, 200, 10, 8.0), (512, 300, 1, 20.0)]
    if arguments.smoke:
        sizes = [(8, 20, 1, None), (8, 10, 3, None)]
        arguments.repeats = 1
    rows, notes = [], []
    for dtype in (torch.float64, torch.float32):
        for width, num_data, num_outputs, target in sizes:
            if width == 512:
                # Asked for: growing with width, so more than width 50 reaches.
                target = rows[-2].ratio
            result, note = row(
                width, num_data, num_outputs, dtype, arguments.repeats, target
            )
            rows.append(result)
            notes.append(note)
    timing.print_rows("Gram matrix of the tangent kernel", rows, notes)


if __name__ == "__main__":
    main()
