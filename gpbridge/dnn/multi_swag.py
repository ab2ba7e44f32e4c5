r"""SWAG around each of several independently trained networks.

.. math:: q(w) = \tfrac1k \sum_{r=1}^k N(w; m_r, \Sigma_r)

Predictive densities are mixed, not moments.

In: networks that are trained from different starts. Out: a
:class:`~gpbridge.weights.MixtureWeights` of their Gaussians. Next: its draws.

References:
    Wilson, Izmailov, Bayesian deep learning and a probabilistic perspective of
    generalization, NeurIPS 2020, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from gpbridge.checks import check_positive
from gpbridge.dnn.replica_input import check_several
from gpbridge.dnn.swag import SWAG
from gpbridge.functional import Parameters
from gpbridge.types import Params
from gpbridge.weights import MixtureWeights


class MultiSWAG(nn.Module):
    """One :class:`~gpbridge.dnn.SWAG` for each of k networks.

    Memory k (rank + 2) p. Three to ten networks, twenty draws of each, are usual.

    Args:
        networks: The modules that are trained; read, never changed.
        rank: Deviations that are kept of each.
        parameters: Which weights are random.
        centering: As for SWAG.
        input_shape: Shape of one input.

    Raises:
        TypeError: If it is one network and not a list.
        ValueError: If there is no network.

    Example:
        >>> networks = [nn.Linear(1, 1) for _ in range(3)]
        >>> tracker = MultiSWAG(networks, rank=2)
        >>> for _ in range(2):  # epochs
        ...     tracker.update(networks)
        >>> len(tracker.posterior().parts)
        3
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        rank: int = 20,
        parameters: Parameters = "all",
        centering: str = "running",
        input_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_several(networks, "networks")
        networks = list(networks)
        if not networks:
            raise ValueError("networks must hold at least one module, but is empty.")
        self.trackers = nn.ModuleList(
            SWAG(network, rank, parameters, centering, input_shape)
            for network in networks
        )

    def update(self, networks: Sequence[nn.Module] | Params) -> None:
        """Take the present weights of all networks into their moments.

        Args:
            networks: The modules in the order of the constructor, or their weights by
                name, ``k x shape``, as a callback of
                :func:`gpbridge.dnn.train_replicas` has them.

        Raises:
            ValueError: If there are more or fewer than the tracker was built for, or
                weights are not finite; no network is taken in then.
        """
        k = len(self.trackers)
        if isinstance(networks, dict):
            lengths = {len(values) for values in networks.values()}
            found = lengths.pop() if len(lengths) == 1 else None
            each = [{n: v[r] for n, v in networks.items()} for r in range(found or 0)]
        else:
            each = list(networks)
            found = len(each)
        if found != k:
            raise ValueError(
                f"networks must be the {k} that the tracker was built for, but "
                f"{'have no common number' if found is None else f'are {found}'}."
            )
        pairs = list(zip(self.trackers, each, strict=True))
        weights = [tracker.read(network) for tracker, network in pairs]
        for (tracker, network), own in zip(pairs, weights, strict=True):
            tracker.accept(network, own)

    def posterior(self, scale: float = 0.5, diagonal: bool = True) -> MixtureWeights:
        """The mixture of the networks' Gaussians; see :meth:`SWAG.posterior`."""
        check_positive(scale=scale)
        min(self.trackers, key=lambda each: each.num_columns).check_rank()  # once
        return MixtureWeights(
            [tracker.gaussian(scale, diagonal) for tracker in self.trackers]
        )
