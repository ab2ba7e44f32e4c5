"""Several starts: the best is kept, failures are told, nothing is left to chance."""

import math
import warnings

import pytest
import torch
from botorch.exceptions.errors import ModelFittingError
from botorch.exceptions.warnings import OptimizationWarning
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.transforms import Normalize
from gpytorch.kernels import MaternKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import nn

from gpbridge.checks import NotConvergedWarning, ShapeError
from gpbridge.kernels.deep import DeepKernel
from gpbridge.kernels.feature import FeatureKernel
from gpbridge.kernels.tangent import NeuralTangentKernel
from gpbridge.selection.multi_start import (
    fit_matern_plus_kernel,
    multi_start,
    objective,
)

NOISE = "likelihood.noise"
SCALE = "covar_module.outputscale"
LENGTH = "covar_module.base_kernel.lengthscale"


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def mll(generator):
    """Few points of a wave in noise: smooth signal or all noise are both optima."""
    X = torch.linspace(0, 1, 12, dtype=torch.float64)[:, None]
    Y = torch.sin(12 * X) + 0.2 * torch.randn(12, 1, dtype=X.dtype, generator=generator)
    model = SingleTaskGP(
        X, Y, likelihood=GaussianLikelihood(), covar_module=ScaleKernel(RBFKernel())
    )
    return ExactMarginalLogLikelihood(model.likelihood, model)


def test_fits_that_end_too_early_are_told_once_and_of_the_best(mll):
    def fit(mll):
        warnings.warn("ended early", NotConvergedWarning, stacklevel=1)

    message = "The best of 3 starts did not converge: ended early"
    with pytest.warns(NotConvergedWarning, match=message) as caught:
        records = multi_start(mll, [{}, {NOISE: 0.5}, {NOISE: 0.1}], fit=fit)
    assert len(caught) == 1
    assert not any(record.converged for record in records)


STARTS = [{LENGTH: 3.0, NOISE: 1.0}, {LENGTH: 0.06, NOISE: 0.05, SCALE: 1.0}]


def log_density(model):
    """Log marginal likelihood typed from Rasmussen and Williams (2006), eq. (2.30)."""
    X, y = model.train_inputs[0], model.train_targets
    K = model.covar_module(X).to_dense() + model.likelihood.noise * torch.eye(len(y))
    r = y - model.mean_module(X)
    quadratic = r @ torch.linalg.solve(K, r)
    value = quadratic + torch.logdet(K) + len(y) * math.log(2 * math.pi)
    return -0.5 * value.item()


def test_the_best_of_the_starts_is_loaded(mll):
    records = multi_start(mll, STARTS)
    values = [record.objective for record in records]
    assert values[1] > values[0] + 1.0, "the starts end in different optima"
    assert all(record.converged and not record.message for record in records)
    assert not mll.training
    assert objective(mll) == pytest.approx(max(values), abs=1e-9)
    assert mll.model.covar_module.base_kernel.lengthscale < 0.5
    backwards = multi_start(mll, STARTS[::-1])
    assert [r.objective for r in backwards] == pytest.approx(values[::-1], abs=1e-3)


def test_objective_is_the_log_density_in_total_nats(mll):
    with torch.no_grad():
        expected = log_density(mll.model)
    assert objective(mll.eval()) == pytest.approx(expected, rel=1e-8)
    assert not mll.training


def test_an_empty_start_is_the_model_as_it_came(mll):
    mll.model.likelihood.noise = 0.3
    seen = []
    multi_start(
        mll,
        [{NOISE: 2.0}, {}],
        fit=lambda mll: seen.append(mll.model.likelihood.noise.item()),
    )
    assert seen == pytest.approx([2.0, 0.3])


def test_starts_may_be_state_dicts(mll):
    mll.model.likelihood.noise = 0.123
    state = {k: v.clone() for k, v in mll.model.state_dict().items()}
    mll.model.likelihood.noise = 1.0
    multi_start(mll, [state], fit=lambda mll: None)
    assert mll.model.likelihood.noise.item() == pytest.approx(0.123)


def test_fits_are_deterministic_and_leave_the_global_state(mll):
    before = torch.random.get_rng_state()
    first = multi_start(mll, STARTS)
    state = {k: v.clone() for k, v in mll.model.state_dict().items()}
    mll.model.initialize(**{LENGTH: 0.6931, NOISE: 0.6931, SCALE: 0.6931})
    second = multi_start(mll, STARTS)
    assert torch.equal(before, torch.random.get_rng_state())
    assert [r.objective for r in first] == pytest.approx([r.objective for r in second])
    for name, value in mll.model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-2, atol=1e-2)


def test_any_fit_and_any_score_will_do(mll):
    records = multi_start(
        mll,
        STARTS,
        fit=lambda mll: fit_gpytorch_mll(mll, max_attempts=1),
        score=lambda mll: -mll.model.likelihood.noise.item(),
    )
    noises = [-record.objective for record in records]
    assert mll.model.likelihood.noise.item() == pytest.approx(min(noises))


def test_outputs_are_summed(generator):
    X = torch.rand(8, 2, dtype=torch.float64, generator=generator)
    Y = torch.stack([X.sum(-1).sin(), X.prod(-1)], -1)
    model = SingleTaskGP(X, Y)
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    (record,) = multi_start(mll, [{}])
    parts = [
        objective(ExactMarginalLogLikelihood(part.likelihood, part))
        for part in (model.subset_output([0]), model.subset_output([1]))
    ]
    assert record.objective == pytest.approx(sum(parts), rel=1e-6)


def test_a_failed_start_is_recorded_and_told(mll):
    def fit(mll):
        if mll.model.likelihood.noise > 0.5:
            raise RuntimeError("no factor")

    with pytest.warns(NotConvergedWarning, match="Start 0 of 2 failed: RuntimeError"):
        records = multi_start(mll, STARTS, fit=fit)
    assert records[0].state is None and records[0].objective == -math.inf
    assert mll.model.likelihood.noise.item() == pytest.approx(0.05)


def test_nan_is_a_failure(mll):
    with pytest.warns(NotConvergedWarning, match="The objective is nan"):
        multi_start(
            mll,
            STARTS,
            fit=lambda mll: None,
            score=lambda mll: (
                math.nan if mll.model.likelihood.noise > 0.5 else objective(mll)
            ),
        )
    assert mll.model.likelihood.noise.item() == pytest.approx(0.05)


def test_an_unfinished_best_start_is_told(mll):
    def fit(mll):
        warnings.warn("stopped at the limit", OptimizationWarning, stacklevel=1)

    with pytest.warns(NotConvergedWarning, match="The best of 1 starts did not conv"):
        (record,) = multi_start(mll, [{}], fit=fit)
    assert not record.converged and record.message == "stopped at the limit"


def test_if_all_fail_the_model_is_as_it_was(mll):
    def fit(mll):
        raise RuntimeError("no factor")

    before = {k: v.clone() for k, v in mll.model.state_dict().items()}
    with (
        pytest.warns(NotConvergedWarning, match="failed"),
        pytest.raises(ModelFittingError, match="All 2 starts failed; the model is as"),
    ):
        multi_start(mll, STARTS, fit=fit)
    for name, value in mll.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_other_warnings_reach_the_caller(mll):
    def fit(mll):
        warnings.warn("look here", UserWarning, stacklevel=1)

    with pytest.warns(UserWarning, match="look here"):
        multi_start(mll, [{}], fit=fit)


def test_no_starts_are_refused(mll):
    with pytest.raises(ValueError, match="starts must name at least one start"):
        multi_start(mll, [])


def test_misspelt_names_are_refused_before_anything_moves(mll):
    before = mll.model.likelihood.noise.item()
    with pytest.raises(ValueError, match="'likelihood.nose', which the model does not"):
        multi_start(mll, [{NOISE: 3.0}, {"likelihood.nose": 0.1}])
    assert mll.model.likelihood.noise.item() == before


class TestMaternPlusKernel:
    @pytest.fixture
    def data(self, generator):
        X = torch.rand(30, 2, dtype=torch.float64, generator=generator)
        noise = torch.randn(30, 1, dtype=X.dtype, generator=generator)
        return X, 3 * X[:, :1] + torch.sin(6 * X[:, 1:]) + 0.05 * noise

    def kernels(self):
        network = nn.Sequential(nn.Linear(2, 10), nn.Tanh(), nn.Linear(10, 1)).double()
        return {
            "feature": FeatureKernel(network[:2]),
            "tangent": NeuralTangentKernel(network),
            "deep": DeepKernel(network[:2], RBFKernel()),
        }

    @pytest.mark.parametrize("name", ["feature", "tangent", "deep"])
    def test_it_fits_and_holds_the_given_kernel(self, data, name):
        X, Y = data
        kernel = self.kernels()[name]
        before = {k: v.clone() for k, v in kernel.state_dict().items()}
        flags = [p.requires_grad for p in kernel.parameters()]
        model = fit_matern_plus_kernel(X[:25], Y[:25], kernel)
        posterior = model.posterior(X[25:], observation_noise=True)
        errors = (posterior.mean - Y[25:]).abs() / posterior.variance.sqrt()
        assert errors.max() < 4
        assert posterior.variance.max() < Y.var()
        inner = model.covar_module.kernels[0].base_kernel
        for key, value in inner.state_dict().items():
            torch.testing.assert_close(value, before[key].to(value))
        assert flags == [p.requires_grad for p in kernel.parameters()]
        assert len(model.starts) == 3 and not model.training
        best = max(record.objective for record in model.starts)
        mll = ExactMarginalLogLikelihood(model.likelihood, model)
        assert objective(mll) == pytest.approx(best, abs=1e-6)

    def test_units_of_the_inputs_do_not_matter_to_the_matern_part(self, data):
        X, Y = data
        starts = [(-8.0, 0.0, -4.0)]

        def zero_kernel():
            return FeatureKernel(lambda x: torch.ones_like(x[..., :1]))

        one = fit_matern_plus_kernel(X, Y, zero_kernel(), starts=starts)
        two = fit_matern_plus_kernel(10 * X + 3, Y, zero_kernel(), starts=starts)
        first, second = one.posterior(X), two.posterior(10 * X + 3)
        torch.testing.assert_close(first.mean, second.mean, rtol=1e-3, atol=1e-3)

    def test_the_size_of_the_given_kernel_does_not_matter(self, data):
        X, Y = data
        kernel = self.kernels()["feature"]
        one = fit_matern_plus_kernel(X, Y, kernel)
        kernel.variance = 1e3
        two = fit_matern_plus_kernel(X, Y, kernel)
        test = X[:5] + 0.1
        mean, again = one.posterior(test).mean, two.posterior(test).mean
        torch.testing.assert_close(mean, again, rtol=1e-3, atol=1e-3)

    def test_noise_may_fall_below_the_floor_of_the_stock_model(self, data):
        X, _ = data
        Y = (3 * X.sum(-1, keepdim=True)).sin()
        model = fit_matern_plus_kernel(X, Y, self.kernels()["feature"])
        assert 0.99e-6 < model.likelihood.noise.item() < 1e-4

    def test_input_transforms_come_first(self, data):
        X, Y = data
        model = fit_matern_plus_kernel(
            100 * X, Y, self.kernels()["feature"], input_transform=Normalize(2)
        )
        assert model.posterior(100 * X[:3]).mean.shape == (3, 1)

    def test_constant_columns_are_harmless(self, data):
        X, Y = data
        X = torch.cat([X, torch.ones(30, 1).double()], -1)
        kernel = FeatureKernel(nn.Linear(3, 4))
        model = fit_matern_plus_kernel(X, Y, kernel, starts=[(0.0, 0.0, -2.0)])
        assert torch.isfinite(model.posterior(X[:3]).mean).all()

    def test_several_outputs_are_refused(self, data):
        X, Y = data
        with pytest.raises(
            ShapeError, match=r"train_Y ``n x 1``, but they have shapes"
        ):
            fit_matern_plus_kernel(X, torch.cat([Y, Y], -1), MaternKernel())

    def test_a_vanishing_kernel_is_refused(self, data):
        X, Y = data
        kernel = FeatureKernel(lambda x: 0 * x)
        with pytest.raises(
            ValueError, match="The kernel has mean variance 0.0 on train"
        ):
            fit_matern_plus_kernel(X, Y, kernel)
