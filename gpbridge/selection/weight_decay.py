r"""Weight decay matched to the prior while a network trains.

A mean loss with coupled decay :math:`\lambda` is the MAP objective of prior variance s
and noise variance v iff :math:`\lambda = v / (s n)`. Choosing s and v by evidence every
few epochs makes the network stationary for the prior its linear model will use, without
a validation set. In: a callback for ``fit_map``. Out: weight decays.
"""

from __future__ import annotations

import math

import torch
from gpytorch.likelihoods import Likelihood
from torch import Tensor, nn

from gpbridge.checks import check_positive
from gpbridge.functional import FunctionalNet
from gpbridge.layer_gram import tangent_features
from gpbridge.likelihoods import hessian_root, is_gaussian
from gpbridge.prediction import weight_precision, whiten
from gpbridge.spectral import decompose
from gpbridge.targets import default_likelihood

_GRID = 61  # values of log prior variance; one noise variance follows from each


class MatchedWeightDecay:
    r"""A weight decay that follows the evidence; pass it to ``fit_map``.

    Every ``every`` epochs the evidence at the trained weights,

    .. math:: \log p(y \mid f) - \tfrac{1}{2s} \|w\|^2
              - \tfrac12 \log\det(I + s R^\top K R),

    is maximised over the prior variance s and, for Gaussian noise, the noise variance
    v, and the decay set to :math:`v / (s n)` (v = 1 for labels). Start early: on noisy
    data a network that has fitted the noise does not forget it.

    Cost: one Gram matrix and one eigendecomposition per update.

    Args:
        epochs: Length of the training run; updates end at 80 % of it.
        initial: Weight decay before the first update.
        first_epoch: Epoch of the first update.
        every: Epochs between updates.
        bounds: Smallest and largest decay.
        likelihood: Of the targets; default by their kind.
        input_shape: As for the network.

    References:
        Immer et al., Scalable Marginal Likelihood Estimation for Model Selection in
        Deep Learning, ICML 2021, algorithm 1 (the alternation).
    """

    def __init__(
        self,
        epochs: int = 300,
        initial: float = 1e-3,
        first_epoch: int = 10,
        every: int = 20,
        bounds: tuple[float, float] = (1e-7, 1e-1),
        likelihood: Likelihood | None = None,
        input_shape: tuple[int, ...] | None = None,
    ) -> None:
        check_positive(epochs=epochs, initial=initial, every=every)
        self.epochs, self.first_epoch, self.every = epochs, first_epoch, every
        self.bounds, self.value = bounds, initial
        self.likelihood, self.input_shape = likelihood, input_shape

    def __call__(self, epoch: int, network: nn.Module, X: Tensor, Y: Tensor) -> float:
        """The decay for this epoch."""
        due = epoch >= self.first_epoch and (epoch - self.first_epoch) % self.every == 0
        if due and epoch <= 0.8 * self.epochs:
            self.value = self._update(network, X, Y)
        return self.value

    @torch.no_grad()
    def _update(self, network: nn.Module, X: Tensor, Y: Tensor) -> float:
        net = FunctionalNet(network, input_shape=self.input_shape)
        if X.device.type == "cpu":
            net = net.double()
        Z = X.to(net.dtype)
        m = net.probe(Z)
        likelihood = self.likelihood or default_likelihood(Y, m, X.dtype)
        outputs = net(Z).double()
        gaussian = is_gaussian(likelihood)
        root = torch.eye(m).to(outputs).expand(len(outputs), m, m)
        if not gaussian:
            root = hessian_root(likelihood, outputs)
        one = {name: outputs.new_ones((), dtype=net.dtype) for name in net.params}
        if net.num_params < outputs.numel():
            batches = _Pairs(net, Z, root, one)
            precision = weight_precision(batches, net.num_params)
            eigenvalues = decompose(precision).eigenvalues
        else:
            gram = tangent_features(net, Z, one).gram().double()
            eigenvalues = decompose(whiten(gram, root)).eigenvalues
        norm = float(sum(p.double().square().sum() for p in net.params.values()))
        error = float((Y.double() - outputs).square().sum()) if gaussian else None
        decay = _best_decay(eigenvalues, norm, error, len(X), outputs.numel())
        return min(max(decay, self.bounds[0]), self.bounds[1])


class _Pairs:
    """Features and roots in chunks."""

    def __init__(
        self, net: FunctionalNet, X: Tensor, root: Tensor, std: dict[str, Tensor]
    ) -> None:
        self.net, self.X, self.root, self.std = net, X, root, std

    def __iter__(self):
        for x, root in zip(self.X.split(64), self.root.split(64), strict=True):
            yield tangent_features(self.net, x, self.std), root


def _best_decay(
    eigenvalues: Tensor, norm: float, error: float | None, n: int, count: int
) -> float:
    """Maximise over a grid of the ratio s / v; the best v is then in closed form.

    With c = s / v the Gaussian evidence is, up to constants, -(error + norm / c) / (2
    v) - count / 2 log v - 1/2 log det(I + c K), so v = (error + norm / c) / count.
    """
    size = float(eigenvalues.sum()) / count
    ratios = torch.logspace(-6, 9, _GRID, dtype=torch.float64) / size
    scaled = ratios[:, None].to(eigenvalues) * eigenvalues
    half_logdet = 0.5 * torch.log1p(scaled).sum(1).cpu()
    if error is None:
        value = -0.5 * norm / ratios - half_logdet
    else:
        noise = ((error + norm / ratios) / count).clamp_min(1e-300)
        value = -0.5 * count * (noise.log() + math.log(2 * math.pi) + 1) - half_logdet
    ratio = float(ratios[value.argmax()])
    return 1.0 / (ratio * n)
