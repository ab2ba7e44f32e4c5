r"""The prior mean of a linearised network with offset, :math:`f(x, w^*) - J(x) w^*`.

In: a frozen network. Out: a gpytorch mean, zero without offset. With the tangent kernel
beside it a network trained elsewhere becomes the prior of any gpytorch model.
Next: ``gp``.
"""

from __future__ import annotations

from gpytorch.means import Mean, MultitaskMean, ZeroMean
from torch import Tensor

from gpbridge.functional import FunctionalNet
from gpbridge.jacobians import jvp


class TangentMean(Mean):
    r"""Mean of the tangent model whose weights have a prior centred at zero.

    .. math:: m(x) = f(x, w^*) - J(x) w^*

    The trained weights enter as data of the linearisation only, not as the centre of
    the prior: that keeps the evidence from using the targets twice.

    Args:
        net: The frozen network, shared, not copied.
    """

    def __init__(self, net: FunctionalNet) -> None:
        super().__init__()
        # Held in a tuple: a kernel owns the network, and its weights should appear in
        # a state_dict once.
        self._net = (net,)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate ``... x n x d``: ``... x n``, or ``... x n x m`` if m > 1."""
        (net,) = self._net
        if net._num_outputs is None:
            net.probe(x)
        z = x.to(net.dtype)
        mean = (net(z) - jvp(net, z, net.flatten(net.params))).to(x.dtype)
        return mean.squeeze(-1) if mean.shape[-1] == 1 else mean


def prior_mean(net: FunctionalNet, offset: bool) -> Mean:
    """The mean of a tangent model with offset, or zero for each output without."""
    if offset:
        return TangentMean(net)
    m = net.num_outputs
    return ZeroMean() if m == 1 else MultitaskMean(ZeroMean(), num_tasks=m)
