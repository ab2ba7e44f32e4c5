r"""Convergence of Markov chains: split R-hat and effective sample size.

In: draws of several chains. Out: one number per coordinate. Next: samplers report them.

References:
    Gelman, Carlin, Stern, Dunson, Vehtari, Rubin, Bayesian Data Analysis, 3rd edition,
    2013, sections 11.4 and 11.5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpbridge.checks import ShapeError, check_tensor

_FEWEST = 4  # draws, so that half a chain has a variance


def split_r_hat(samples: Tensor) -> Tensor:
    r"""Potential scale reduction of chains that are cut into halves.

    With B / n the variance of the means of the halves, of n draws each, and W the mean
    of their variances,

    .. math:: \hat R = \sqrt{\frac{(1 - 1/n) W + B / n}{W}} .

    Far above 1 (1.1, say) the chains, or the halves of one, disagree. Infinity if
    nothing moves.

    Args:
        samples: ``chains x s x r`` with at least four draws.

    Returns:
        ``r``.

    Raises:
        ShapeError: If there are fewer draws, or not three axes.
    """
    halves = _halves(samples)
    n = halves.shape[1]
    within, total = _variances(halves)
    ratio = ((within * (1 - 1 / n) + total) / within).sqrt()
    return torch.where(within > 0, ratio, torch.inf)


def effective_sample_size(samples: Tensor) -> Tensor:
    r"""How many independent draws would have means as certain as those of the chains.

    .. math:: s_{\mathrm{eff}} = \frac{m n}{1 + 2 \sum_t \hat\rho_t}

    of m half chains of n draws, with autocorrelations summed while the sums of two
    neighbours are positive (Geyer's initial sequence). Costs m n log n.

    Args:
        samples: ``chains x s x r`` with at least four draws.

    Returns:
        ``r``; at most m n log10(m n), since chains that alternate can beat independent
        draws and noise alone can seem to. One if nothing moves.

    Raises:
        ShapeError: If there are fewer draws, or not three axes.
    """
    halves = _halves(samples)
    m, n, _ = halves.shape
    within, between = _variances(halves)
    total = within * (1 - 1 / n) + between
    centred = halves - halves.mean(1, keepdim=True)
    spectrum = torch.fft.rfft(centred, 2 * n, dim=1).abs().square()
    covariance = torch.fft.irfft(spectrum, 2 * n, dim=1)[:, :n].mean(0) / (n - 1)
    correlation = 1 - (within - covariance) / total  # n x r
    correlation[0] = 1
    pairs = correlation[: n - n % 2].reshape(-1, 2, correlation.shape[-1]).sum(1)
    kept = pairs * (pairs > 0).cumprod(0)
    kept = kept.cummin(0).values  # of a reversible chain they decrease
    size = m * n / (2 * kept.sum(0) - 1)
    most = m * n * torch.log10(torch.tensor(float(m * n)))
    size = torch.where(size > 0, size, most).clamp_max(most)
    return torch.where(within > 0, size, 1.0)


def _halves(samples: Tensor) -> Tensor:
    """Twice as many chains of half the length, in float64."""
    check_tensor(samples=samples)
    if samples.dim() != 3 or samples.shape[1] < _FEWEST:
        raise ShapeError(
            f"samples must be ``chains x s x r`` with at least {_FEWEST} draws, but "
            f"has shape {tuple(samples.shape)}. For one chain pass samples[None]."
        )
    half = samples.shape[1] // 2
    return torch.cat([samples[:, :half], samples[:, -half:]]).double()


def _variances(halves: Tensor) -> tuple[Tensor, Tensor]:
    """Mean variance within the halves, and variance of their means."""
    return halves.var(1).mean(0), halves.mean(1).var(0)
