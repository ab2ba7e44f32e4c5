"""Functions of a posterior, frozen: what every view of a posterior evaluates.

In: a posterior over weights, a GP of this library, or functions that were drawn. Out:
copies of s functions, with batch-norm statistics of their own or a warning, and their
values in one shape: all of them at common inputs, or each at its own. Next:
``function_space`` and ``acquisition``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Generator, Tensor, nn

from gpbridge.batch_norm import is_stale, refresh_batch_norm
from gpbridge.checks import ReliabilityWarning, ShapeError, warn_user
from gpbridge.draws import at_own_inputs
from gpbridge.types import FitResult, FunctionDraws, WeightPosterior


def freeze(
    posterior: WeightPosterior | FunctionDraws,
    num_samples: int,
    generator: Generator | None = None,
) -> FunctionDraws:
    """Frozen functions of a posterior, as copies that nobody else moves or changes.

    Args:
        posterior: What has a ``draw``, or frozen functions as they are.
        num_samples: How many; a finite posterior of at most as many gives each member
            once.
        generator: Source of the draws.

    Returns:
        The functions.

    Raises:
        TypeError: If nothing can be drawn or evaluated.
    """
    if not hasattr(posterior, "draw"):
        refuse_what_holds_one(posterior)
        if not callable(posterior) or isinstance(posterior, type):
            raise TypeError(
                "posterior must have draw(num_samples, generator), or be functions "
                f"that it returned, but is {type(posterior).__name__}. For a network "
                "or its snapshots try gpbridge.weights.EmpiricalWeights."
            )
        return copy.deepcopy(posterior)
    members = getattr(posterior, "num_members", None)
    if members is not None and members <= num_samples:
        return copy.deepcopy(posterior.draw())
    return copy.deepcopy(posterior.draw(num_samples, generator))


def refuse_what_holds_one(value: object) -> None:
    """Say what to pass in place of what leads to a posterior.

    Raises:
        TypeError: If it does, or is one network.
    """
    name = type(value).__name__
    if hasattr(value, "update") and callable(getattr(value, "posterior", None)):
        raise TypeError(
            f"posterior is a {name}, which observes a run. Pass its posterior(): "
            "tracker.posterior()."
        )
    if isinstance(value, tuple) and hasattr(value, "posterior"):
        raise TypeError(
            f"posterior is a {name}, the result of a search. Pass its .posterior."
        )
    is_layer = isinstance(value, nn.Module) and type(value).__module__[:8] == "torch.nn"
    if isinstance(value, FitResult) or is_layer:
        raise TypeError(
            f"posterior is a {name}, one network, which has no spread. Train several "
            "and pass gpbridge.dnn.DeepEnsemble of them, or find a posterior of its "
            "weights, such as gpbridge.dnn.SWAG or gpbridge.weights.EmpiricalWeights."
        )


def refreshed(
    draws: FunctionDraws, batches: Iterable[Tensor | Sequence[Tensor]] | None
) -> FunctionDraws:
    """Draws with batch-norm statistics of their own, or a warning that they lack them.

    Args:
        draws: Changed in place.
        batches: Training inputs, or None.

    Returns:
        The draws.

    Warns:
        ReliabilityWarning: If there are no batches, and the statistics are those of
            other weights.
    """
    if batches is not None:
        refresh_batch_norm(draws, batches)
    elif is_stale(draws):
        warn_user(
            "The network has batch normalisation, and the draws have the statistics of "
            "other weights than their own. Pass batches=[X], the training inputs, or "
            "call gpbridge.batch_norm.refresh_batch_norm on the draws and pass these.",
            ReliabilityWarning,
        )
    return draws


def evaluate(draws: FunctionDraws, X: Tensor) -> Tensor:
    """Values of frozen functions, ``s x ... x n x m`` at inputs ``... x n x d``.

    Raises:
        ShapeError: If they have another shape: a network is callable too.
    """
    values = draws(X)
    if values.shape[1:-1] != X.shape[:-1] or values.dim() != X.dim() + 1:
        raise ShapeError(
            f"{type(draws).__name__} must map ``... x n x d`` inputs to the values "
            f"``s x ... x n x m`` of s functions, but maps shape {tuple(X.shape)} to "
            f"{tuple(values.shape)}. For a network or its snapshots try "
            "gpbridge.weights.EmpiricalWeights."
        )
    return values


def evaluate_each(draws: FunctionDraws, X: Tensor) -> Tensor:
    """Values of frozen functions, each at inputs of its own.

    What a simulation needs in which every particle follows one function: no function is
    evaluated at another one's inputs. Draws of this library do so in one vectorised
    pass (those of dropout, and functions without a method ``each``, in s passes of all
    functions).

    Args:
        draws: s functions.
        X: Inputs of each, ``s x ... x n x d``.

    Returns:
        ``s x ... x n x m``.

    Raises:
        ShapeError: If the inputs are not of s functions, or the values have another
            shape.
    """
    held = getattr(draws, "num_samples", None)
    if X.dim() < 3 or held not in (None, len(X)):
        number = "s" if held is None else held
        raise ShapeError(
            f"X must be ``{number} x ... x n x d``, inputs of each of the functions, "
            f"but has shape {tuple(X.shape)}. For common inputs try evaluate(draws, X)."
        )
    values = at_own_inputs(draws, X)
    if values.shape[:-1] != X.shape[:-1] or values.dim() != X.dim():
        raise ShapeError(
            f"{type(draws).__name__} must map inputs ``s x ... x n x d`` of s "
            "functions to values ``s x ... x n x m``, but maps shape "
            f"{tuple(X.shape)} to "
            f"{tuple(values.shape)}. For a network or its snapshots try "
            "gpbridge.weights.EmpiricalWeights."
        )
    return values


def take(draws: FunctionDraws, samples: Tensor) -> FunctionDraws:
    """Some of the functions, by number, with repetitions or without."""
    if hasattr(draws, "take"):
        return draws.take(samples)
    return SomeDraws(draws, samples)


class SomeDraws(nn.Module):
    """Some of s functions that cannot be had apart, such as those of one seed.

    All of them are evaluated.

    Args:
        draws: The functions.
        samples: Numbers of those that count, ``k``.
    """

    def __init__(self, draws: FunctionDraws, samples: Tensor) -> None:
        super().__init__()
        self.draws = draws
        self.register_buffer("samples", samples)

    @property
    def num_samples(self) -> int:
        """The number k of functions that count."""
        return len(self.samples)

    def forward(self, X: Tensor) -> Tensor:
        """Evaluate them, ``... x n x d`` to ``k x ... x n x m``."""
        return evaluate(self.draws, X)[self.samples]

    def each(self, X: Tensor) -> Tensor:
        """Evaluate each at inputs of its own, ``k x ... x n x d`` likewise."""
        if not hasattr(self.draws, "each"):
            own = torch.arange(len(X), device=X.device)
            return evaluate(self.draws, X)[self.samples, own]
        # The inputs of each function side by side; where there are fewer, others fill.
        same = self.samples[:, None] == self.samples
        turn = same.tril(-1).sum(-1)  # how many before it are of the same function
        width, s = int(turn.max()) + 1, self.draws.num_samples
        place = self.samples * width + turn
        rows = torch.zeros(s * width, dtype=torch.long, device=X.device)
        rows[place] = torch.arange(len(X), device=X.device)
        values = self.draws.each(X[rows].unflatten(0, (s, width)))
        return values.flatten(0, 1)[place]


class SeenDraws(nn.Module):
    """Draws in other units than their own.

    Args:
        draws: The functions.
        prepare: Maps the caller's inputs to theirs.
        finish: Maps their values ``s x ... x n x m`` to the caller's, given their
            inputs.
    """

    def __init__(
        self,
        draws: FunctionDraws,
        prepare: Callable[[Tensor], Tensor],
        finish: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.draws, self.prepare, self.finish = draws, prepare, finish

    @property
    def num_samples(self) -> int:
        """The number s of functions."""
        return self.draws.num_samples

    def forward(self, X: Tensor) -> Tensor:
        """Evaluate all draws, ``... x n x d`` to ``s x ... x n x m``."""
        Z = self.prepare(X)
        return self.finish(evaluate(self.draws, Z), Z)

    def each(self, X: Tensor) -> Tensor:
        """Evaluate each draw at inputs of its own, ``s x ... x n x d`` likewise."""
        Z = self.prepare(X)
        return self.finish(evaluate_each(self.draws, Z), Z)

    def take(self, samples: Tensor) -> SeenDraws:
        """Some of the functions, by number."""
        return SeenDraws(take(self.draws, samples), self.prepare, self.finish)
