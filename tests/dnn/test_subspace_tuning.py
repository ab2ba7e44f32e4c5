"""The choice of temperature and prior in a subspace."""

import math

import pytest
import torch

from gpbridge.batch_norm import refresh_batch_norm
from gpbridge.dnn.point_likelihood import mixture_log_density
from gpbridge.dnn.subspace import Subspace
from gpbridge.dnn.subspace_inference import sample_subspace
from gpbridge.dnn.subspace_methods import (
    EllipticalSliceSampling,
)
from gpbridge.dnn.subspace_tuning import tune_subspace
from gpbridge.functional import FunctionalNet
from gpbridge.weights import GaussianWeights
from tests.dnn.subspace_problems import METHODS, Block, gaussian, linear_problem

NOISE, STD = 0.3, 1.5


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def tuning_problem():
    subspace, X, Y = linear_problem(30)
    return subspace, X[:20], Y[:20], X[20:], Y[20:], gaussian()


def test_the_table_is_the_held_out_density_of_each_pair():
    problem = tuning_problem()
    found = tune_subspace(
        *problem,
        temperatures=(1.0, 1e4),
        prior_stds=(0.01, 1.0),
        method=EllipticalSliceSampling(num_samples=20, burn_in=10),
        generator=seeded(),
        progress=False,
    )
    assert found.table.shape == (2, 2)
    best = found.table.max()
    for i, temperature in enumerate(found.temperatures):
        for j, std in enumerate(found.prior_stds):
            run = sample_subspace(
                *(*problem[:3], problem[5]),
                temperature=temperature,
                prior_std=std,
                method=EllipticalSliceSampling(num_samples=20, burn_in=10),
                generator=seeded(),
                progress=False,
            )
            f = run.posterior.draw()(problem[3])[..., 0]
            logs = torch.distributions.Normal(f, NOISE**0.5).log_prob(problem[4][:, 0])
            score = logs.exp().mean(0).log().mean()
            torch.testing.assert_close(found.table[i, j], score)
            if score == best:
                assert (found.temperature, found.prior_std) == (temperature, std)
                assert torch.equal(found.best.samples, run.samples)
    # Well specified: Bayes' rule wins over what is nearly the prior, or the origin.
    assert (found.temperature, found.prior_std) == (1.0, 1.0)


def test_the_grid_has_defaults_and_any_method_fits():
    found = tune_subspace(
        *tuning_problem(), prior_stds=(1.0,), method=METHODS["full"], progress=False
    )
    assert found.temperatures == (1.0, 20 / 3, 10.0, 100.0, 1000.0, 10000.0)
    assert isinstance(found.best.posterior, GaussianWeights)
    assert bool(torch.isfinite(found.table).all())


@pytest.mark.parametrize("batch_size", [None, 19])  # 20 rows: none is left alone
def test_tuning_refreshes_batch_norm(batch_size):
    torch.manual_seed(0)
    network = Block(norm=True).double()
    subspace = Subspace.random(FunctionalNet(network), None, 2, generator=seeded())
    X, Y = 3 + 2 * normal(20, 2), normal(20, 1)
    given = {"method": METHODS["slice"], "generator": seeded(), "progress": False}
    given["batch_size"] = batch_size
    found = tune_subspace(subspace, X, Y, X, Y, gaussian(), (1.0,), (1.0,), **given)
    batches = [X] if batch_size is None else [X[:10], X[10:]]
    draws = refresh_batch_norm(found.best.posterior.draw(), batches)
    score = mixture_log_density(gaussian(), draws, X, Y)
    torch.testing.assert_close(found.table[0, 0], score)


def test_a_grid_without_a_finite_score_is_an_error():
    subspace, X, Y, X_val, Y_val, _ = tuning_problem()

    def impossible(f, y):
        return torch.full_like(f[..., 0], -math.inf if len(y) == 10 else 0.0)

    data = subspace, X, Y, X_val, Y_val
    with pytest.raises(ValueError, match="No candidate has a finite log density"):
        tune_subspace(*data, impossible, (1.0,), (1.0,), progress=False)
    for name in ("temperatures", "prior_stds"):
        with pytest.raises(ValueError, match=f"{name} must be positive"):
            tune_subspace(*data, gaussian(), **{name: (1.0, -1.0)}, progress=False)
        with pytest.raises(ValueError, match="must hold at least one candidate"):
            tune_subspace(*data, gaussian(), **{name: ()}, progress=False)
