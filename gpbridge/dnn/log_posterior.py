r"""The log posterior of the weights of a network, on all data or on a minibatch.

.. math:: \log p(w \mid D) = \tfrac1T \sum_i \log p(y_i \mid f(x_i, w)) + \log p(w)
          + \mathrm{const}

In: a network, a likelihood, a prior over weights. Out: a function of named weights and
a batch. Next: samplers and variational inference climb it.

References:
    Wenzel, Roth, Veeling, Świątkowski, Tran, Mandt, Snoek, Salimans, Jenatton, Nowozin,
    How good is the Bayes posterior in deep neural networks really?, ICML 2020, eqs.
    (1) and (3) (of its two temperatures, that of the likelihood).
"""

from __future__ import annotations

from gpytorch.likelihoods import Likelihood
from torch import Tensor, nn

from gpbridge.checks import ShapeError, check_choice, check_count, check_positive
from gpbridge.dnn.priors import WeightPrior
from gpbridge.functional import FunctionalNet
from gpbridge.likelihoods import log_prob
from gpbridge.types import Params


class LogPosterior(nn.Module):
    r"""Log density of weights given data, up to a constant, differentiable in both.

    On a minibatch of b of N points the sum is scaled by N / b, so that its gradient is
    unbiased. A likelihood temperature T below one makes the posterior colder: the data
    count as if there were N / T of them.

    Args:
        net: The network as a function of its random weights.
        likelihood: A gpytorch likelihood that :mod:`gpbridge.likelihoods` knows.
        num_data: N.
        prior: A density of named weights; default independent standard normals.
        likelihood_temperature: T.
        reduction: ``"sum"``, total nats, or ``"mean"``, nats per datum. A sampler on
            the mean has the temperature 1 / N.

    Raises:
        ValueError: If an option is not one of those named, or not positive.
    """

    def __init__(
        self,
        net: FunctionalNet,
        likelihood: Likelihood,
        num_data: int,
        prior: nn.Module | None = None,
        likelihood_temperature: float = 1.0,
        reduction: str = "sum",
    ) -> None:
        super().__init__()
        check_count(num_data=num_data)
        check_positive(likelihood_temperature=likelihood_temperature)
        check_choice("reduction", reduction, ("sum", "mean"))
        self.net, self.likelihood, self.num_data = net, likelihood, num_data
        self.prior = WeightPrior() if prior is None else prior
        self.likelihood_temperature = likelihood_temperature
        self.reduction = reduction

    def forward(
        self, params: Params, X: Tensor, Y: Tensor, noise: Tensor | None = None
    ) -> Tensor:
        """Evaluate at weights, on a batch.

        Args:
            params: Weights by name.
            X: Inputs ``b x d``.
            Y: Targets in the form of the likelihood, b of them.
            noise: Noise variances of these points, for a likelihood with fixed ones.

        Returns:
            A scalar.

        Raises:
            ShapeError: If the batch is empty.
        """
        if not len(X):
            raise ShapeError("X must have at least one row, but the batch is empty.")
        values = self.net.apply_network(params, X)
        fit = log_prob(self.likelihood, values, Y, noise).sum() * (
            self.num_data / len(X)
        )
        total = fit / self.likelihood_temperature + self.prior(params)
        return total / self.num_data if self.reduction == "mean" else total
