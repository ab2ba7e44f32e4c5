"""Copies, pickles and state dicts of a linearised GP."""

import copy
import pickle

import pytest
import torch

from gpbridge import Exact
from gpbridge.checks import ShapeError
from gpbridge.selection import fit_evidence
from tests.linearized import problems
from tests.linearized.problems import PROBLEMS, build, every_likelihood


@every_likelihood
def test_the_state_carries_network_data_and_hyperparameters(name, tmp_path):
    model = build(name, groups="layer")
    model.prior_variance = torch.tensor([0.3, 0.7], dtype=torch.float64)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    X = problems.inputs()
    other = problems.network(PROBLEMS[name].m, scale=0.7)
    fresh = build(name, X=X.flip(0), groups="layer", net=other)
    fresh.posterior(X)  # caches that must go
    fresh.load_state_dict(state)
    X_test = problems.inputs(5, seed=7)
    got, expected = fresh.posterior(X_test), model.posterior(X_test)
    torch.testing.assert_close(got.mean, expected.mean, rtol=0, atol=0)
    torch.testing.assert_close(got.variance, expected.variance, rtol=0, atol=0)
    assert fresh.log_evidence().item() == model.log_evidence().item()


@every_likelihood
def test_copies_and_pickles_are_independent(name):
    model, X = build(name), problems.inputs(5, seed=7)
    before = model.posterior(X)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        got = twin.posterior(X)
        torch.testing.assert_close(got.mean, before.mean, rtol=0, atol=0)
        torch.testing.assert_close(got.variance, before.variance, rtol=0, atol=0)
        twin.prior_variance = 2.0
        for p in twin.likelihood.parameters():
            p.data.add_(1.0)
    after = model.posterior(X)
    torch.testing.assert_close(after.variance, before.variance, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["gaussian", "multitask"])
def test_observations_conditioned_on_are_part_of_the_state(name, tmp_path):
    X, Y = problems.inputs(4, seed=8), problems.targets(name, problems.inputs(4))
    model = build(name).condition_on_observations(X, Y)
    if name == "multitask":
        model = build(name).subset_output([1]).condition_on_observations(X, Y[:, 1:])
    torch.save(model.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    fresh, X_test = build(name), problems.inputs(5, seed=7)
    plain = fresh.state_dict()
    fresh.load_state_dict(state)
    got, expected = fresh.posterior(X_test), model.posterior(X_test)
    torch.testing.assert_close(got.mean, expected.mean, rtol=0, atol=0)
    torch.testing.assert_close(got.variance, expected.variance, rtol=0, atol=0)
    assert fresh.output_indices == model.output_indices
    fresh.load_state_dict(plain)  # a state without them has none
    torch.testing.assert_close(
        fresh.posterior(X_test).mean, build(name).posterior(X_test).mean
    )


def test_which_noise_is_fixed_is_part_of_the_state():
    model = build("gaussian", mean="network", noise=0.2)
    for assign in (False, True):
        fresh = build("gaussian")
        fresh.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
        assert (fresh.mean, fresh.noise) == ("network", 0.2)
        fit_evidence(fresh, warn=False)
        assert fresh.noise_variance.item() == pytest.approx(0.2)
        fresh.use_mean("linear_model", "learn")  # what froze it is known
        fit_evidence(fresh, warn=False)
        assert fresh.noise_variance.item() != pytest.approx(0.2)


def test_arguments_of_loading_are_named():
    model = build("gaussian")
    model.load_state_dict(model.state_dict(), keep_transforms=False, assign=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'keep_transfrom'"):
        model.load_state_dict(model.state_dict(), keep_transfrom=False)


@pytest.mark.parametrize("option", [None, torch.float32, torch.float64])
def test_moves_change_the_data_not_the_precision_of_jacobians(option):
    model = build("gaussian", inference=Exact(jacobian_dtype=option))
    X, Y = problems.inputs(4, seed=8), problems.targets("gaussian", problems.inputs(4))
    model = model.condition_on_observations(X, Y)
    expected = model.posterior(X).mean
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        assert model.functional.dtype == (option or torch.float64)
        assert {x.dtype for x in (model._new.X, model._new.Y)} == {dtype}
        got = model.posterior(X.to(dtype)).mean
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-3)
        assert model.draw(2)(X.to(dtype)).shape == (2, 4, 1)


def test_a_model_of_some_rows_is_not_fitted_and_not_calibrated():
    model = build("softmax")
    model.fitted, model.calibration = "calibrate", object()
    part = model.subset_rows(torch.arange(5))
    assert part.fitted is None and part.calibration is None
    mask = torch.arange(12) < 5
    torch.testing.assert_close(model.subset_rows(mask).train_inputs, part.train_inputs)
    assert model.fitted == "calibrate"


def test_rows_that_are_not_there_are_refused():
    model, X = build("gaussian"), problems.inputs(3)
    with pytest.raises(
        TypeError, match="rows must be row numbers or a mask, but is of"
    ):
        model.subset_rows(torch.zeros(3))
    with pytest.raises(ShapeError, match=r"a mask of 12 rows, but has shape \(3,\)"):
        model.subset_rows(torch.ones(3, dtype=torch.bool))
    with pytest.raises(ShapeError, match=r"vector of row numbers, .* shape \(1, 2\)"):
        model.subset_rows(torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match=r"rows in 0 .. 11, .* 2 between 3 and 12"):
        model.subset_rows(torch.tensor([3, 12]))
    with pytest.raises(ValueError, match="at least one, but are 0 between None"):
        model.subset_rows(torch.zeros(12, dtype=torch.bool))
    with pytest.raises(TypeError, match="rows must be a torch.Tensor"):
        model.subset_rows([0, 1])
    conditioned = model.condition_on_observations(X, X[:, :1])
    with pytest.raises(
        NotImplementedError, match="subset_rows is that of the 12 train"
    ):
        conditioned.subset_rows(torch.arange(3))
