"""Gaussian processes and deep networks as one thing, for GPyTorch and BoTorch.

A trained network plus a Gaussian prior over its weights is a Gaussian process. Bring
any ``torch.nn.Module``: :class:`LinearizedGP` conditions it on data, ``selection``
learns its hyperparameters by marginal likelihood, and the result is a BoTorch model.
"""

import importlib
from types import ModuleType

from gpbridge import (
    data,
    dnn,
    kernels,
    likelihoods,
    linearized,
    metrics,
    plots,
    selection,
)
from gpbridge._version import __version__
from gpbridge.linearized import Exact, LinearizedGP
from gpbridge.sampled import SampledGP
from gpbridge.types import Evidence, FitResult

__all__ = [
    "Evidence",
    "Exact",
    "FitResult",
    "LinearizedGP",
    "SampledGP",
    "__version__",
    "data",
    "dnn",
    "kernels",
    "likelihoods",
    "linearized",
    "metrics",
    "plots",
    "selection",
]


def __getattr__(name: str) -> ModuleType:
    # A tenth of a second that only those who test their own models should pay.
    if name == "testing":
        return importlib.import_module("gpbridge.testing")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
