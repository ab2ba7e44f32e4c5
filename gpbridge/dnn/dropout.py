r"""Monte Carlo dropout as a distribution over functions.

A draw is a set of masks, the same for every input: then it is a function, and its
values at two inputs are correlated. Fresh masks for every row, as a batch in train mode
has them, give independent rows, from which no joint acquisition can be computed.

In: a network with dropout layers, as it is. Out: frozen functions. Next: the same views
as of every other posterior.

References:
    Gal, Ghahramani, Dropout as a Bayesian approximation: representing model uncertainty
    in deep learning, ICML 2016.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn
from torch.func import vmap

from gpbridge.checks import check_count, check_inputs
from gpbridge.frozen import copy_without_hooks, first_line
from gpbridge.prior_draws import check_points
from gpbridge.probe import check_input_shape, check_outputs, run_or_explain
from gpbridge.randomness import fresh
from gpbridge.tracing import traceable
from gpbridge.weights import Drawable

_DROPOUTS = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout, nn.MultiheadAttention),
)


class MCDropout(Drawable):
    """The functions that a network becomes under its own dropout.

    Owns a copy in eval mode but for the dropout layers; batch norm keeps its statistics
    and the caller's module is not changed.

    Args:
        network: A module with dropout layers of torch.nn.
        input_shape: Shape of one input, to unflatten the ``d`` columns.

    Raises:
        ValueError: If no layer drops anything.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.1), nn.Linear(8, 1))
        >>> MCDropout(network).draw(5)(torch.zeros(4, 2)).shape
        torch.Size([5, 4, 1])
    """

    def __init__(
        self, network: nn.Module, input_shape: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.network = copy_without_hooks(network).requires_grad_(False)
        self.input_shape = None if input_shape is None else tuple(input_shape)
        if not any(_rate(module) > 0 for module in self.network.modules()):
            raise ValueError(
                "network must have a dropout layer with p > 0, such as "
                "nn.Dropout(0.1). Dropout by torch.nn.functional inside a forward is "
                "not seen: make it a layer."
            )
        self.train(False)

    def train(self, mode: bool = True) -> MCDropout:
        """Set the mode of everything but the network: only its dropout is active."""
        super().train(mode)
        self.network.eval()
        for module in self.network.modules():
            if _rate(module) > 0:
                module.train()
        return self

    def draw(
        self,
        num_samples: int,
        generator: Generator | None = None,
        chunk_size: int | None = None,
    ) -> DropoutDraws:
        """Freeze functions, one set of masks each.

        Args:
            num_samples: How many.
            generator: Source of the masks.
            chunk_size: Bounds memory, see :class:`DropoutDraws`.

        Returns:
            The functions.
        """
        check_count(num_samples=num_samples)
        generator = fresh(generator)
        seed = torch.randint(
            2**62, (), generator=generator, device=generator.device
        ).cpu()
        return DropoutDraws(self, num_samples, seed, chunk_size)


class DropoutDraws(nn.Module):
    """Functions with masks that a seed determines.

    Args:
        posterior: The network with active dropout.
        num_samples: The number s of functions.
        seed: Of all masks, a whole number.
        chunk_size: Draws whose activations at all rows are held at once; default all.
            It bounds memory alone: rows and not draws are split, so that the masks,
            and with them the functions, stay what they are. May be set later.
    """

    def __init__(
        self,
        posterior: MCDropout,
        num_samples: int,
        seed: Tensor,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        if chunk_size is not None:
            check_count(chunk_size=chunk_size)
        self.posterior, self.num_samples = posterior, num_samples
        self.chunk_size = chunk_size
        self.register_buffer("seed", seed)

    def forward(self, X: Tensor) -> Tensor:
        """Evaluate all draws, ``... x n x d`` to ``s x ... x n x m``.

        The masks do not depend on the number of rows; memory is that of s n rows, or of
        ``chunk_size`` n.

        Raises:
            TypeError: If X is no tensor, or the network does not return one.
            ShapeError: If the inputs do not fit the network.
            ValueError: If the network cannot be vectorised.
        """  # noqa: DOC502
        return self._values(X, False).reshape(self.num_samples, *X.shape[:-1], -1)

    def each(self, X: Tensor) -> Tensor:
        """Evaluate each draw at inputs of its own, ``s x ... x n x d`` likewise."""
        check_points(X, X.shape[-1] if X.dim() else 1, self.num_samples)
        return self._values(X, True).reshape(*X.shape[:-1], -1)

    def _values(self, X: Tensor, own: bool) -> Tensor:
        check_inputs(X, "X")
        posterior, s = self.posterior, self.num_samples
        if posterior.input_shape is not None:
            check_input_shape(posterior.input_shape, X)
        Z = X.to(next(posterior.network.parameters(), X).dtype)
        lead = (s,) if own else ()
        rows = Z.reshape(*lead, -1, 1, *(posterior.input_shape or X.shape[-1:]))
        size = rows.shape[len(lead)]
        if self.chunk_size is not None:
            size = math.ceil(size * min(self.chunk_size, s) / s)
        parts = rows.split(max(1, size), len(lead))
        return torch.cat([self._evaluate(part, own) for part in parts], 1).to(X.dtype)

    def extra_repr(self) -> str:
        """How many draws."""
        return f"num_draws={self.num_samples}"

    def _evaluate(self, rows: Tensor, own: bool) -> Tensor:
        """Values at rows ``(s x) n x 1 x ...``, ``s x n x ...``."""
        network, device = self.posterior.network, rows.device

        def each(_: Tensor, rows: Tensor) -> Tensor:
            # "same": every row meets the masks of this draw.
            return vmap(lambda row: network(row)[0], randomness="same")(rows)

        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), traceable():
            torch.random.default_generator.manual_seed(int(self.seed))
            for one in devices:
                with torch.cuda.device(one):  # it seeds the present one alone
                    torch.cuda.manual_seed(int(self.seed))
            start = torch.zeros(self.num_samples, device=device)
            try:
                dims = (0, 0 if own else None)
                return vmap(each, dims, randomness="different")(start, rows)
            except Exception as error:
                self._explain(rows[0] if own else rows, error)
                raise

    @torch.no_grad()
    def _explain(self, rows: Tensor, error: Exception) -> None:
        network, shape = self.posterior.network, self.posterior.input_shape
        some = rows[:2].flatten(0, 1).detach()
        check_outputs(run_or_explain(network, some, shape), some)
        if type(error) is RuntimeError:
            raise ValueError(
                "torch.func.vmap cannot evaluate the draws side by side: "
                f"{first_line(error)} Replace what depends on values, as an if or "
                ".item(), by torch.where."
            ) from error


def _rate(module: nn.Module) -> float:
    if not isinstance(module, _DROPOUTS):
        return 0.0
    return module.dropout if isinstance(module, nn.MultiheadAttention) else module.p
