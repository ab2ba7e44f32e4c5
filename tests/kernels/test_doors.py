"""What is no argument of a kernel is refused by its name."""

import pytest
import torch
from gpytorch.kernels import RBFKernel
from torch import nn

from gpbridge.augmentation import FiniteOrbit
from gpbridge.kernels import (
    ConvolutionalKernel,
    DeepKernel,
    FeatureKernel,
    InfiniteWidthKernel,
    InvariantKernel,
    NeuralTangentKernel,
    parameter_groups,
)
from gpbridge.kernels.wide_convolutions import Conv
from gpbridge.kernels.wide_layers import Dense, LeakyReLU, Residual

NET = nn.Linear(4, 2)
FLIPS = FiniteOrbit.flips((2, 2))
ONE = "must be one number, but is"


def convolutional(**options):
    return ConvolutionalKernel(RBFKernel(), (2, 2), **{"patch_shape": 1, **options})


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: convolutional(location_kernel="a"), "must be a gpytorch Kernel"),
        (lambda: convolutional(patch_shape="aa"), "patch_shape must be"),
        (lambda: convolutional(memory_budget=(1,)), f"memory_budget {ONE}"),
        (lambda: InvariantKernel(RBFKernel(), FLIPS, chunk_size=0.5), "chunk_size"),
        (lambda: DeepKernel(NET, RBFKernel(), spectral_norm=(1,)), f"norm {ONE}"),
        (lambda: DeepKernel(NET, RBFKernel(), input_shape="aa"), "be a shape of one"),
        (lambda: FeatureKernel(NET, input_shape=0.5), "input_shape must be a shape"),
        (lambda: NeuralTangentKernel(NET, input_shape=(2, -2)), "be a shape of one"),
        (lambda: NeuralTangentKernel(NET, groups=None), "groups must be a sequence"),
        (lambda: NeuralTangentKernel(NET, groups=["weight"]), r"groups\[0\] must be"),
        (lambda: NeuralTangentKernel(NET, weight_covariance="a"), "or a linear oper"),
        (
            lambda: NeuralTangentKernel(NET, prior_variance_constraint="a"),
            "must be a gpytorch Interval",
        ),
        (lambda: InfiniteWidthKernel(None), "layers must be a sequence"),
        (lambda: InfiniteWidthKernel(Dense()), "layers must be a sequence"),
        (lambda: InfiniteWidthKernel([Dense()], input_shape=4), "be .channels, hei"),
        (lambda: InfiniteWidthKernel.from_module([Dense()]), "goes to InfiniteWidth"),
        (
            lambda: InfiniteWidthKernel.from_module(NET, weight_variance=(1,)),
            f"weight_variance {ONE}",
        ),
        (lambda: Dense(bias_variance=torch.ones(2)), f"bias_variance {ONE}"),
        (lambda: Conv(3, padding=None), "padding must be a whole number"),
        (lambda: Conv(3, tap_lengthscale=(1.0,)), f"tap_lengthscale {ONE}"),
        (lambda: LeakyReLU("a"), f"negative_slope {ONE}"),
        (lambda: Residual(None), "layers must be a sequence"),
        (lambda: Residual([Dense()], None), "shortcut must be a sequence"),
        (lambda: parameter_groups("a", 0.1, 0.1), "model must be a torch Module"),
    ],
)
def test_other_things_are_named(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_whole_numbers_are_variances():
    kernel = InfiniteWidthKernel.from_module(NET, weight_variance=3, bias_variance=1)
    assert kernel.weight_variance.item() == pytest.approx(3)
    assert kernel.bias_variance.item() == pytest.approx(1)


@pytest.mark.parametrize("deep", [False, True])
def test_rows_of_other_columns_do_not_run_into_each_other(deep):
    """Two rows of two columns would have been one row of four."""
    kernel = FeatureKernel(NET, input_shape=(4,))
    if deep:
        kernel = DeepKernel(NET, RBFKernel(), input_shape=(4,))
    with pytest.raises(ValueError, match="have 4 columns, but x has 2"):
        kernel(torch.zeros(6, 2)).to_dense()
