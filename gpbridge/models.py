"""GPs whose kernel contains a network, alone or in sums and products.

In: data and a kernel. Out: a botorch ``SingleTaskGP`` that shows each training point to
the network once. Next: ``linearized`` and ``selection`` build recipes from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from botorch.models import SingleTaskGP
from gpytorch.distributions import Distribution
from gpytorch.models import ExactGP
from torch import Size, Tensor


class NetworkKernelGP(SingleTaskGP):
    """A ``SingleTaskGP`` whose kernel meets the training inputs as they are.

    Upstream joins training and test inputs for every t-batch and evaluates the kernel
    on all of them, which is cheap for a Matérn kernel and not for a network: at 1000
    points an acquisition costs 136 times a Matérn's. Here the test points meet the
    training inputs without copies, so that
    :class:`gpbridge.kernels.NeuralTangentKernel` keeps its features of the training
    data. All else, arguments included, is upstream's.

    Example:
        >>> from gpytorch.kernels import MaternKernel, ScaleKernel
        >>> from gpbridge.kernels import NeuralTangentKernel
        >>> X = torch.rand(6, 2).double()
        >>> net = torch.nn.Linear(2, 1).double()
        >>> kernel = NeuralTangentKernel(net) + ScaleKernel(MaternKernel())
        >>> model = NetworkKernelGP(X, X.sum(-1, keepdim=True), covar_module=kernel)
        >>> model.posterior(X[:2]).mean.shape
        torch.Size([2, 1])
    """

    def _get_test_prior_mean_and_covariances(
        self,
        train_inputs: Iterable[Tensor],
        test_inputs: Iterable[Tensor],
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Size, Size, type[Distribution]]:
        (train_X,), (test_X,) = train_inputs, test_inputs
        # ExactGP.__call__ would condition; Module's calls forward, which is the prior.
        output = super(ExactGP, self).__call__(test_X, **kwargs)
        batch_shape = torch.broadcast_shapes(output.batch_shape, train_X.shape[:-2])
        # Fantasies are a batch of training data beside one set of test points.
        covariance = output.lazy_covariance_matrix
        return (
            output.loc.expand(*batch_shape, *output.loc.shape[-1:]),
            covariance.expand(*batch_shape, *covariance.shape[-2:]),
            self.covar_module(test_X, train_X),
            batch_shape,
            output.event_shape,
            output.__class__,
        )
