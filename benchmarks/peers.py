"""The peer, laplace-torch 0.3, behind three builders; absent, a message says how.

Its default backend is Curvlinops; BackPACK is what an informed user chooses for the
layers that it supports. Every builder copies the network: the peer writes to it.
"""

from __future__ import annotations

import copy
import sys

from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

INSTALL = """laplace-torch is not installed in this environment. Use one of its own:

    python -m venv .venv-peer && . .venv-peer/bin/activate
    pip install torch==2.13.0          # the build that gpbridge is tested with
    pip install gpytorch botorch tqdm scikit-learn
    pip install curvlinops-for-pytorch torchmetrics opt-einsum einops einconv unfoldNd
    pip install --no-deps laplace-torch==0.3 asdfghjkl==0.1a4 backpack-for-pytorch
    pip install --no-deps -e .

torchvision is left out on purpose: it is not needed, and a build that does not match
torch breaks the import."""

try:
    import laplace
    from backpack.context import CTX
    from laplace.curvature import BackPackGGN, CurvlinopsGGN
except ImportError:
    laplace = None

BATCH = 100  # the peer's memory in fit grows with it


def require_laplace() -> None:
    """Leave with the installation lines, and without an error, if it is absent."""
    if laplace is None:
        print(f"Skipped: {INSTALL}")
        sys.exit(0)


def loader(X: Tensor, Y: Tensor) -> DataLoader:
    """Batches in order, as the peer wants them."""
    return DataLoader(TensorDataset(X, Y), batch_size=BATCH)


def parametric(
    network: nn.Module,
    likelihood: str,
    structure: str,
    backpack: bool,
    noise_variance: float = 1.0,
) -> laplace.ParametricLaplace:
    """All weights, prior precision 1, Hessian ``"full"`` or ``"kron"``; not fitted."""
    require_laplace()
    return laplace.Laplace(
        copy.deepcopy(network),
        likelihood,
        subset_of_weights="all",
        hessian_structure=structure,
        sigma_noise=noise_variance**0.5,
        prior_precision=1.0,
        backend=BackPackGGN if backpack else CurvlinopsGGN,
    )


def functional(
    network: nn.Module, num_data: int, noise_variance: float
) -> laplace.FunctionalLaplace:
    """The Gaussian process form on all data, prior precision 1; not fitted."""
    require_laplace()
    return laplace.Laplace(
        copy.deepcopy(network),
        "regression",
        subset_of_weights="all",
        hessian_structure="gp",
        n_subset=num_data,
        sigma_noise=noise_variance**0.5,
        prior_precision=1.0,
    )


def predict(fitted: laplace.BaseLaplace, X: Tensor, **options: str) -> object:
    """Call the peer, with its BackPACK hooks in order.

    One model's Jacobians remove the hooks of every other model in the process, so two
    models cannot take turns; without hooks and without their flag, each sets its own.
    """
    CTX.remove_hooks()
    for module in fitted.model.modules():
        if hasattr(module, "_backpack_extend"):
            del module._backpack_extend
    return fitted(X, **options)
