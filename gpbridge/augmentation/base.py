r"""What all augmentations share: orbits of frozen transformations, redrawn on request.

In: inputs, and base noise that all of them share. Out: their orbits, one more axis.
Next: ``vectors``, ``images``, ``orbits`` and ``patches`` are distributions over
transformations; ``kernels.invariant`` averages a kernel over them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import gpytorch
import torch
from gpytorch.constraints import Interval
from torch import Generator, Tensor, nn

from gpbridge.checks import (
    ShapeError,
    check_choice,
    check_count,
    check_floating,
    check_positive,
    check_tensor,
    is_whole,
)
from gpbridge.randomness import fresh

SAMPLINGS = ("auto", "grid", "qmc", "fixed")


class DifferenceLaw(NamedTuple):
    r"""The law of :math:`T_a^{-1} T_{a'}`, for independent a and a'.

    The transformations are isometries. A kernel that is invariant to all of the group
    needs only this:
    :math:`E\,E'\, k(T_a x, T_{a'} x') = \sum_j w_j\, k(x, T_j x')`.
    """

    orbit: Callable[[Tensor], Tensor]  # ... x n x d to ... x n x s x d
    weights: Tensor  # s of them, with sum one


class Augmentation(gpytorch.Module):
    r"""A distribution over transformations, represented by s of them.

    Maps inputs ``... x n x d`` to their orbits ``... x n x s x d``. A function that is
    averaged over orbits, :math:`\bar f(x) = \frac1s \sum_a w_a f(T_a x)`, is invariant
    to the degree that the law is spread; its width is a parameter that the marginal
    likelihood can learn.

    The transformations are functions of parameters and of base noise, the buffer
    ``noise``. All rows share it, and it stays what it is until :meth:`resample`. This
    is what makes a kernel of orbits a function of two inputs. With noise drawn anew
    in each call, the blocks of one predictive covariance belong to different kernels,
    and its variances turn negative.

    A subclass writes :meth:`transform`, and has the attributes below where its law
    differs from the defaults.

    Args:
        num_samples: The number s of transformations.
        num_parameters: Columns of the base noise, zero if nothing is random.
        sampling: ``"grid"`` (midpoints of s equal cells; one column only), ``"qmc"``
            (scrambled Sobol points), ``"fixed"`` (independent draws), or ``"auto"``:
            a grid for one column, Sobol points for several.
        seed: Of the Sobol points or of the draws, at construction.

    Attributes:
        weights: s weights :math:`w_a` of the transformations, or None for ones.
        orbit_size: The number of elements of the orbit that the s are taken from,
            infinite for a continuous law.

    Raises:
        ValueError: If a grid is asked for several columns.

    Example:
        >>> class Shift(Augmentation):
        ...     def transform(self, x):
        ...         return x[..., None, :] + self.noise.to(x)
        >>> Shift(num_samples=4, num_parameters=1)(torch.zeros(5, 3)).shape
        torch.Size([5, 4, 3])

    References:
        van der Wilk et al., Learning invariances using the marginal likelihood, NeurIPS
        2018, section 4.1.
    """

    orbit_size: float = math.inf

    def __init__(
        self,
        num_samples: int,
        num_parameters: int = 0,
        sampling: str = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_count(num_samples=num_samples)
        check_choice("sampling", sampling, SAMPLINGS)
        if num_parameters != 0:
            check_count(num_parameters=num_parameters)
        if not is_whole(seed):
            raise TypeError(f"seed must be a whole number, but is {seed!r}.")
        if sampling == "auto":
            sampling = "grid" if num_parameters <= 1 else "qmc"
        if sampling == "grid" and num_parameters > 1:
            raise ValueError(
                f"A grid is for one random parameter, but there are {num_parameters}. "
                "Choose sampling='qmc'."
            )
        self.num_samples = num_samples
        self.num_parameters = num_parameters
        self.sampling = sampling
        self._redraws = 0  # no option of a run: ``noise`` is in its state
        self.register_buffer("noise", self._centred(self._unit_points(None, seed)))

    @property
    def redraws(self) -> int:
        """How often the transformations were redrawn; kernels compare it."""
        return self._redraws

    @property
    def weights(self) -> Tensor | None:
        """Weights of the transformations, ``s``; None stands for ones."""
        return None

    def transform(self, x: Tensor) -> Tensor:
        """Orbits of checked inputs, ``... x n x d`` to ``... x n x s x d'``."""
        raise NotImplementedError

    def output_width(self, width: int) -> int:
        """The number d' of columns of an orbit of inputs with d columns."""
        return width

    def difference_law(self) -> DifferenceLaw | None:
        """The law of differences, where there is one that takes fewer evaluations."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        """The orbits of inputs.

        Args:
            x: Inputs ``... x n x d``.

        Returns:
            Their s transformations, ``... x n x s x d'``.

        Raises:
            ShapeError: If the inputs have another width than the transformations need.
        """
        check_tensor(x=x)
        check_floating(x=x)
        if x.dim() < 2:
            raise ShapeError(
                f"x must be ``... x n x d``, but has shape {tuple(x.shape)}. For one "
                "point try x[None]."
            )
        if x.numel() == 0:
            width = self.output_width(x.shape[-1])
            return x.new_zeros(*x.shape[:-1], self.num_samples, width)
        return self.transform(x)

    def average(self, values: Tensor, dim: int = -2) -> Tensor:
        r"""The weighted mean :math:`\frac1s \sum_a w_a v_a` along an axis."""
        if self.weights is None:
            return values.mean(dim)
        return torch.tensordot(values.movedim(dim, -1), self.coefficients(values), 1)

    def coefficients(self, like: Tensor) -> Tensor:
        """The factors ``w_a / s`` of a mean over the orbit, ``s``."""
        weights = self.weights
        if weights is None:
            return like.new_full((self.num_samples,), 1 / self.num_samples)
        return weights.to(like) / self.num_samples

    def resample(self, generator: Generator | None = None) -> None:
        """Redraw the transformations, for all inputs at once.

        A grid is shifted as a whole, Sobol points are scrambled anew, and nothing
        happens where nothing is random. Between two draws the kernel of these orbits
        is another one. So this belongs between the steps of an optimiser, and is
        refused in eval mode, where gpytorch keeps what it computed with the old ones.
        A kernel whose orbits were redrawn behind its back, while it was in eval mode,
        refuses to be evaluated.

        Args:
            generator: Source of randomness. Without one, draws differ in each call.

        Raises:
            RuntimeError: In eval mode.
        """
        if not self.training:
            raise RuntimeError(
                "The orbit cannot be redrawn in eval mode: what was computed for the "
                "prediction belongs to the old one, and variances would turn negative. "
                "Call train() on the whole model first, which clears what gpytorch "
                "keeps."
            )
        if self._redraw(generator):
            self._redraws += 1

    def _redraw(self, generator: Generator | None) -> bool:
        """Draw anew; whether there was anything to draw."""
        if self.num_parameters == 0:
            return False
        points = self._unit_points(fresh(generator), None)
        self.noise = self._centred(points).to(self.noise)
        return True

    def _apply(self, *args, **kwargs) -> Augmentation:
        """Noise moves between devices but stays in float64.

        A model that is made in float32 and turned to float64 has the exact grid.
        """
        noise = self.noise
        super()._apply(*args, **kwargs)
        self.noise = noise.to(self.noise.device)
        return self

    def _centred(self, points: Tensor) -> Tensor:
        """Base noise from uniform points of the unit cube; here in [-1, 1]."""
        return 2 * points - 1

    def _unit_points(self, generator: Generator | None, seed: int | None) -> Tensor:
        """Points ``s x k`` of the unit cube, float64."""
        s, k = self.num_samples, self.num_parameters
        if self.sampling == "grid":
            shift = torch.tensor(0.5, dtype=torch.float64)
            if generator is not None:
                shift = _uniform((), generator)
            cells = torch.arange(s, dtype=torch.float64)
            return ((cells + shift) / s)[:, None].expand(s, k).clone()
        if generator is None:
            generator = Generator().manual_seed(seed)
        if self.sampling == "fixed":
            return _uniform((s, k), generator)
        device = generator.device
        number = torch.randint(2**31, (), generator=generator, device=device)
        sobol = torch.quasirandom.SobolEngine(k, scramble=True, seed=int(number))
        return sobol.draw(s, dtype=torch.float64)


class BoundedAugmentation(Augmentation):
    r"""Transformations whose parameters are uniform on learnable intervals.

    The half-widths are :math:`b = c\,\sigma(\rho)`: below the cap c, with a gradient
    everywhere. A law that is symmetric makes the kernel even in b, so that b = 0 is a
    stationary point: start above it.

    Args:
        cap: Upper limits of the half-widths, ``k``.
        init: Where the half-widths start, ``k``.
        num_samples: The number s of transformations.
        sampling: As for :class:`Augmentation`.
        seed: As for :class:`Augmentation`.

    Raises:
        ValueError: If a start lies outside of zero and its cap.
    """

    def __init__(
        self, cap: Tensor, init: Tensor, num_samples: int, sampling: str, seed: int
    ) -> None:
        super().__init__(num_samples, len(cap), sampling, seed)
        check_positive(cap=cap)
        dtype = torch.get_default_dtype()
        zeros = torch.zeros(len(cap), dtype=dtype)
        self.register_parameter("raw_bound", nn.Parameter(zeros.clone()))
        limits = zeros, cap.to(dtype)
        if len(cap) == 1:  # upstream prints numbers, but no vectors of one
            limits = [limit[0] for limit in limits]
        self.register_constraint("raw_bound", Interval(*limits))
        self.bound = init

    @property
    def cap(self) -> Tensor:
        """Upper limits of the half-widths, ``k``."""
        return self.raw_bound_constraint.upper_bound.expand(self.raw_bound.shape)

    @property
    def bound(self) -> Tensor:
        """Half-widths of the uniform laws of the parameters, ``k``."""
        return self.raw_bound_constraint.transform(self.raw_bound)

    @bound.setter
    def bound(self, value: float | Tensor) -> None:
        raw = self.raw_bound
        value = torch.as_tensor(value, dtype=raw.dtype, device=raw.device)
        if not bool(((value > 0) & (value < self.cap)).all()):
            raise ValueError(
                f"bound must lie above zero and below {_numbers(self.cap)}, but is "
                f"{_numbers(value)}. At zero the evidence has no gradient; start with "
                "a small positive number."
            )
        value = value.expand(raw.shape)
        self.initialize(raw_bound=self.raw_bound_constraint.inverse_transform(value))

    def parameters_of(self, x: Tensor) -> Tensor:
        """Parameters of the s transformations, ``s x k``, as the inputs are."""
        return self.bound.to(x) * self.noise.to(x)


def check_elements(law: Augmentation, name: str = "augmentation") -> None:
    """Require more than the identity where a half-width is learnt.

    Args:
        law: With the noise that it will have.
        name: What the message calls it.

    Raises:
        ValueError: If no element of its orbits depends on the half-width.
    """
    if not isinstance(law, BoundedAugmentation) or not law.raw_bound.requires_grad:
        return
    if not bool(law.noise.any()):
        raise ValueError(
            f"{name} has the identity as its only element (num_samples="
            f"{law.num_samples}), whatever its bound. Take 2 samples or more, 16 for "
            "instance."
        )


def natural_name(name: str) -> str:
    """The name of a parameter's value in natural units: ``bound`` of ``raw_bound``."""
    return ".".join(part.removeprefix("raw_") for part in name.split("."))


def _uniform(shape: tuple[int, ...], generator: Generator) -> Tensor:
    options = {"dtype": torch.float64, "device": generator.device}
    return torch.rand(shape, generator=generator, **options).cpu()


def _numbers(value: Tensor) -> str:
    numbers = [round(number, 6) for number in value.detach().flatten().tolist()]
    return str(numbers[0] if len(numbers) == 1 else numbers)
