r"""Mean-field variational inference over the weights of a network.

Independent normals :math:`q(w) = N(\mu, \mathrm{diag}\, \sigma^2)` that maximise the
evidence lower bound, by stochastic gradients.

In: a network and a likelihood. Out: a loss on batches of data, and
:class:`~gpbridge.weights.GaussianWeights` without a low-rank part. Next:
``variational_fit`` runs the loop.

References:
    Blundell, Cornebise, Kavukcuoglu and Wierstra, Weight uncertainty in neural
    networks, ICML 2015, eqs. (1) and (2) and section 3.2. Kingma, Salimans and Welling,
    NeurIPS 2015.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from gpytorch.likelihoods import Likelihood
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn.functional import softplus

from gpbridge.checks import (
    ShapeError,
    check_choice,
    check_count,
    check_positive,
)
from gpbridge.dnn.local_reparameterization import LocalNoise, local_weights
from gpbridge.dnn.priors import GaussianPrior, WeightPrior
from gpbridge.draws import WeightDraws
from gpbridge.functional import FunctionalNet, Parameters
from gpbridge.likelihoods import log_prob
from gpbridge.randomness import fresh, standard_normal
from gpbridge.weights import GaussianWeights


class MeanFieldVI(nn.Module):
    r"""Independent normals over weights, with the loss that fits them.

    The loss is T times the negative evidence lower bound, per datum,

    .. math::
        - \frac1b \sum_{i \in B} \mathbb{E}_q \log p(y_i \mid f(x_i, w))
        + \frac{T}{N} \mathrm{KL}(q \,\|\, p), \qquad
        \mathrm{KL} = \sum_j \tfrac12 \Bigl( \frac{\mu_j^2 + \sigma_j^2}{v_j} - 1
        + \log \frac{v_j}{\sigma_j^2} \Bigr),

    with :math:`\sigma = \mathrm{softplus}(\rho)`. A temperature T below one tempers the
    likelihood, p(D|w)^(1/T) p(w). Where :mod:`gpbridge.dnn.local_reparameterization`
    applies, the outputs of a layer are drawn for every datum; all other random weights
    are drawn once per pass. A pass costs about two of the network.

    The network is copied, and is in eval mode: no dropout, batch-norm statistics as
    they are. The likelihood is copied too, and its parameters, such as the noise, are
    learnt with the same loss unless they have ``requires_grad=False``.

    Args:
        network: Its weights are the first means, so that a trained one is a good start.
        likelihood: One that :mod:`gpbridge.likelihoods` knows.
        num_data: N.
        prior: Gaussian for every group of weights; default independent standard
            normals.
        initial_std: The first :math:`\sigma`.
        likelihood_temperature: T.
        parameters: Which weights are random, as in
            :class:`~gpbridge.functional.FunctionalNet`; the others are constants.
        local_reparameterization: ``"exact"``, where it does not change the law of a
            pass; ``"all"``, also in convolutions and at several positions of a datum,
            with independent noise at each, as is often done: where later layers average
            over positions, the loss then sees too little noise and q becomes too wide;
            ``"none"``.
        input_shape: Shape of one input, to unflatten the ``d`` columns.

    Raises:
        ValueError: If an option is not one of those named or not positive, or the prior
            is not Gaussian.

    Example:
        >>> X = torch.linspace(-1, 1, 40)[:, None]
        >>> from gpytorch.likelihoods import GaussianLikelihood
        >>> vi = MeanFieldVI(nn.Linear(1, 1), GaussianLikelihood(), num_data=40)
        >>> optimizer = torch.optim.Adam(vi.parameters(), lr=0.01)
        >>> vi.loss(X, 3 * X).backward()  # and so on, over batches
        >>> _ = optimizer.step()
        >>> vi.posterior().draw(5)(X).shape
        torch.Size([5, 40, 1])
    """

    def __init__(
        self,
        network: nn.Module,
        likelihood: Likelihood,
        num_data: int,
        *,
        prior: WeightPrior | GaussianPrior | None = None,
        initial_std: float = 0.05,
        likelihood_temperature: float = 1.0,
        parameters: Parameters = "all",
        local_reparameterization: str = "exact",
        input_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_count(num_data=num_data)
        check_positive(
            initial_std=initial_std, likelihood_temperature=likelihood_temperature
        )
        check_choice(
            "local_reparameterization",
            local_reparameterization,
            ("exact", "all", "none"),
        )
        self.net = FunctionalNet(network, parameters, input_shape)
        self.likelihood = copy.deepcopy(likelihood)
        self.num_data = num_data
        self.likelihood_temperature = likelihood_temperature
        self.local_reparameterization = local_reparameterization
        weights = self.net.flatten(self.net.params).detach().clone()
        # The inverse of softplus, which loses no digits of small numbers.
        rho = math.log(math.expm1(initial_std)) if initial_std < 30 else initial_std
        self.mean = nn.Parameter(weights)
        self.rho = nn.Parameter(torch.full_like(weights, rho))
        self.register_buffer("prior_variance", _prior_variances(self.net, prior))
        self._local: set[str] | None = None  # found on the first batch

    @property
    def variance(self) -> Tensor:
        r"""The variances :math:`\sigma^2` of the weights, ``p``."""
        return softplus(self.rho).square()

    def kl(self) -> Tensor:
        """Divergence of q from the prior, total nats, in closed form."""
        variance, prior = self.variance, self.prior_variance
        ratio = (variance + self.mean.square()) / prior
        return 0.5 * (ratio - 1 + prior.log() - variance.log()).sum()

    def loss(
        self,
        X: Tensor,
        Y: Tensor,
        generator: Generator | None = None,
        num_samples: int = 1,
        noise: Tensor | None = None,
    ) -> Tensor:
        """The loss on a batch, an unbiased estimate of that on all data.

        Args:
            X: Inputs ``b x d``.
            Y: Targets in the form of the likelihood, b of them.
            generator: Source of the weight noise.
            num_samples: Passes to average over.
            noise: Noise variances of these points, for a likelihood with fixed ones.

        Returns:
            A scalar in nats per datum, differentiable in means, deviations and the
            parameters of the likelihood.

        Raises:
            ShapeError: If the batch is empty.
            TypeError: If X has another dtype than the weights.
        """
        check_count(num_samples=num_samples)
        if not len(X):
            raise ShapeError("X must have at least one row, but the batch is empty.")
        if X.dtype != self.mean.dtype:
            raise TypeError(
                f"X must be {self.mean.dtype} as the weights are, but is {X.dtype}. "
                f"Try X.to({self.mean.dtype})."
            )
        generator = fresh(generator, X.device)
        fits = [
            log_prob(self.likelihood, self.sample_outputs(X, generator), Y, noise)
            for _ in range(num_samples)
        ]
        fit = torch.stack(fits).mean()
        return self.likelihood_temperature * self.kl() / self.num_data - fit

    def sample_outputs(self, X: Tensor, generator: Generator | None = None) -> Tensor:
        """Outputs under fresh weight noise, ``b x d`` to ``b x m``, not a function.

        Rows may have noise of their own; :meth:`draw` freezes functions.
        """
        net = self.net
        rows = X.reshape(len(X), *(net.input_shape or X.shape[1:]))
        means, variances = net.unflatten(self.mean), net.unflatten(self.variance)
        local = self._local_weights(means, rows)
        params = {
            name: mean
            if name in local
            else mean
            + variances[name].sqrt() * standard_normal(mean.shape, generator, mean)
            for name, mean in means.items()
        }
        moments = [{name: part[name] for name in local} for part in (params, variances)]
        with LocalNoise(*moments, generator):
            outputs = functional_call(net.network, net.whole(params), (rows,))
        return outputs.reshape(len(X), -1)

    def _local_weights(self, means: dict[str, Tensor], rows: Tensor) -> set[str]:
        if self._local is None:
            self._local = set()
            if self.local_reparameterization != "none":
                everywhere = self.local_reparameterization == "all"
                entries = self.net.entries  # of a part of a tensor each is drawn
                tensors = {n: mean for n, mean in means.items() if n not in entries}
                self._local = local_weights(self.net.network, tensors, rows, everywhere)
        return self._local

    def posterior(self) -> GaussianWeights:
        """The distribution q as it is now; later steps do not change it."""
        return GaussianWeights(self.net, self.mean, self.variance)

    def draw(self, num_samples: int, generator: Generator | None = None) -> WeightDraws:
        """Freeze functions at draws of the weights."""
        return self.posterior().draw(num_samples, generator)


def _prior_variances(
    net: FunctionalNet, prior: WeightPrior | GaussianPrior | None
) -> Tensor:
    prior = WeightPrior() if prior is None else prior
    variances = {}
    for name, weight in net.params.items():
        own = prior.prior_of(name) if isinstance(prior, WeightPrior) else prior
        if not isinstance(own, GaussianPrior):
            raise ValueError(
                "The divergence is in closed form for Gaussian priors only, but "
                f"{name} has a {type(own).__name__}. Pass WeightPrior(GaussianPrior("
                "variance)), or sample with gpbridge.dnn.sample_sgmcmc."
            )
        variances[name] = own.variance.to(weight).expand(weight.shape)
    return net.flatten(variances).detach().clone()
