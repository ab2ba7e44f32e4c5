"""Predicted noise against derivatives of its density, and training of a network."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.distributions import Normal

from gpbridge.checks import InputDataError, ShapeError
from gpbridge.dnn import fit_map
from gpbridge.heteroscedastic import HeteroscedasticGaussianLikelihood
from gpbridge.likelihoods import (
    hessian_root,
    is_gaussian,
    log_prob,
    noise_variances,
    residual,
    sample_residual,
)
from gpbridge.targets import check_targets
from gpbridge.testing import assert_module_unchanged

MONTE_CARLO = {"atol": 0.05, "rtol": 0.05}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def variance_of(raw, floor=1e-6):
    return torch.log1p(raw.exp()) + floor


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_the_density_is_that_of_a_normal_per_output_means_first(m, batch):
    likelihood = HeteroscedasticGaussianLikelihood(m, floor=0.01)
    f, y = normal(*batch, 5, 2 * m), normal(*batch, 5, m, seed=1)
    std = variance_of(f[..., m:], 0.01).sqrt()
    expected = Normal(f[..., :m], std).log_prob(y).sum(-1)
    torch.testing.assert_close(log_prob(likelihood, f, y), expected)
    torch.testing.assert_close(likelihood(f).log_prob(y), expected)
    torch.testing.assert_close(noise_variances(likelihood, f), std.square())
    assert not is_gaussian(likelihood)  # its posterior is not exact


@pytest.mark.parametrize("m", [1, 2])
def test_the_residual_is_the_derivative_of_the_density(m):
    likelihood = HeteroscedasticGaussianLikelihood(m)
    f, y = normal(4, 2 * m).requires_grad_(), normal(4, m, seed=1)
    (expected,) = torch.autograd.grad(log_prob(likelihood, f, y).sum(), f)
    torch.testing.assert_close(residual(likelihood, f, y), expected)


@pytest.mark.parametrize("m", [1, 2])
def test_the_curvature_is_the_expected_hessian(m):
    # The Hessian is quadratic in the residual, so that two points of probability one
    # half, one standard deviation to either side, give its expectation exactly.
    likelihood = HeteroscedasticGaussianLikelihood(m, floor=0.05)
    f = normal(2 * m)
    std = variance_of(f[m:], 0.05).sqrt()

    def hessian(y):
        return torch.autograd.functional.hessian(
            lambda f: -log_prob(likelihood, f[None], y[None]).sum(), f
        )

    expected = (hessian(f[:m] + std) + hessian(f[:m] - std)) / 2
    R = hessian_root(likelihood, f[None])[0]
    torch.testing.assert_close(R @ R.mT, expected, atol=1e-12, rtol=1e-9)
    draws = sample_residual(likelihood, f.expand(20000, 2 * m), seeded())
    torch.testing.assert_close(
        draws.mT.cov().reshape(2 * m, 2 * m), R @ R.mT, **MONTE_CARLO
    )


def test_large_raw_outputs_stay_finite_and_the_floor_holds():
    likelihood = HeteroscedasticGaussianLikelihood()
    f = torch.tensor([[0.0, -300.0], [0.0, 300.0]]).requires_grad_()
    mean, variance = likelihood.moments(f)
    torch.testing.assert_close(variance.detach().flatten(), torch.tensor([1e-6, 300.0]))
    log_prob(likelihood, f, torch.ones(2, 1)).sum().backward()
    assert bool(f.grad.isfinite().all())


class TwoHeads(nn.Module):
    """A body shared by a mean and a noise, as users write it."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(1, 20), nn.Tanh())
        self.mean, self.noise = nn.Linear(20, 1), nn.Linear(20, 1)

    def forward(self, x):
        h = self.body(x)
        return torch.cat([self.mean(h), self.noise(h)], -1)


def test_training_learns_a_noise_that_grows_with_the_input():
    X = torch.linspace(0, 1, 400)[:, None]
    std = 0.05 + 0.5 * X
    Y = X + std * torch.randn(400, 1, generator=seeded())
    torch.manual_seed(0)
    network = TwoHeads()
    with assert_module_unchanged(network):
        fit = fit_map(
            network,
            X,
            Y,
            HeteroscedasticGaussianLikelihood(),
            epochs=60,
            learning_rate=0.02,
            progress=False,
        )
    with torch.no_grad():
        outputs = fit.network(X)
    mean, variance = HeteroscedasticGaussianLikelihood().moments(outputs)
    ends = variance[[40, 360], 0].sqrt()
    torch.testing.assert_close(ends, std[[40, 360], 0], rtol=0.35, atol=0)
    assert float((mean[200] - X[200]).abs()) < 0.1
    assert fit.residual_variance is None
    # The validation loss is the density in nats, which the generating law bounds.
    law = (std.log() + 0.5 * math.log(2 * math.pi * math.e)).mean()
    assert min(fit.history["validation_loss"]) < float(law) + 0.3


def test_two_targets_train_on_four_outputs():
    X = normal(30, 2)
    likelihood = HeteroscedasticGaussianLikelihood(2)
    torch.manual_seed(0)
    network = nn.Linear(2, 4).double()
    fit = fit_map(network, X, X, likelihood, epochs=3, progress=False)
    assert fit.history["train_loss"][-1] < fit.history["train_loss"][0]


def test_copies_and_pickles_keep_the_options():
    likelihood = HeteroscedasticGaussianLikelihood(2, floor=0.3)
    for twin in (copy.deepcopy(likelihood), pickle.loads(pickle.dumps(likelihood))):
        assert (twin.num_outputs, twin.floor) == (2, 0.3)
    assert not list(likelihood.parameters())


def test_bad_input_says_what_to_try():
    likelihood = HeteroscedasticGaussianLikelihood()
    with pytest.raises(ShapeError, match="two outputs per target"):
        likelihood.moments(torch.zeros(3, 3))
    for rule in (noise_variances, hessian_root):
        with pytest.raises(ValueError, match="noise must be None"):
            rule(likelihood, torch.zeros(3, 2), noise=torch.ones(3))
    with pytest.raises(ValueError, match="floor must be positive"):
        HeteroscedasticGaussianLikelihood(floor=0.0)
    with pytest.raises(ValueError, match="num_outputs must be a whole number"):
        HeteroscedasticGaussianLikelihood(0)
    with pytest.raises(ShapeError, match="two outputs per column of targets"):
        check_targets(likelihood, torch.zeros(3, 1), 1, 3)
    with pytest.raises(ShapeError, match=r"``3 x 1`` .* shape \(3, 2\)"):
        check_targets(likelihood, torch.zeros(3, 2), 2, 3)
    with pytest.raises(TypeError, match="train_Y must be float32 or float64"):
        check_targets(likelihood, torch.zeros(3, 1).long(), 2, 3)
    with pytest.raises(TypeError, match="train_Y must be torch.float64"):
        check_targets(likelihood, torch.zeros(3, 1), 2, 3, torch.float64)
    with pytest.raises(InputDataError, match="NaN or Inf in 1 of 3"):
        Y = torch.tensor([[0.0], [torch.nan], [0.0]])
        check_targets(likelihood, Y, 2, 3)
