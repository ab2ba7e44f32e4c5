"""Which rows of a training run a model is conditioned on, and which stay held out."""

import dataclasses

import pytest
import torch

from gpbridge import FitResult, LinearizedGP
from gpbridge.checks import ShapeError
from gpbridge.linearized.training_run import restricted
from gpbridge.selection import fit_evidence
from tests.linearized.problems import build, inputs, network, targets

EXACT = {"rtol": 1e-9, "atol": 1e-12}
FIT, HELD_OUT = torch.tensor([5, 0, 3, 1, 2, 11, 9, 10]), torch.tensor([4, 6, 7, 8])


def training_run(net, variance=0.2):
    one = None if variance is None else torch.full((1,), variance).double()
    return FitResult(net, FIT, HELD_OUT, one, one, 1e-4)


@pytest.mark.parametrize("name", ["gaussian", "softmax"])
def test_only_the_rows_that_the_run_fitted_can_be_conditioned_on(name):
    m = 3 if name == "softmax" else 1
    X, Y, net = inputs(), targets(name, inputs()), network(m)
    run = training_run(net, None if m > 1 else 0.2)
    model = LinearizedGP.from_fit(run, X, Y, rows="fit")
    plain = LinearizedGP(net, X[FIT], Y[FIT])
    torch.testing.assert_close(
        model.posterior(X).variance, plain.posterior(X).variance, **EXACT
    )
    assert len(model.train_targets) == len(FIT) and model.select is None
    assert len(LinearizedGP.from_fit(run, X, Y).train_targets) == len(X)


def test_the_record_of_the_run_counts_the_rows_of_the_model():
    X, Y, net = inputs(), targets("gaussian", inputs()), network()
    model = LinearizedGP.from_fit(training_run(net), X, Y, rows="fit")
    assert model.fit_result.fit_rows.tolist() == list(range(len(FIT)))
    assert len(model.fit_result.validation_rows) == 0
    fit_evidence(model, warn=False)  # its diagnostics read the fit rows
    part = LinearizedGP.from_fit(training_run(net), X, Y).subset_rows(
        torch.tensor([4, 0, 5, 8])
    )
    assert part.fit_result.fit_rows.tolist() == [2, 1]
    assert part.fit_result.validation_rows.tolist() == [0, 3]
    fit_evidence(part, warn=False)
    same = restricted(training_run(net), torch.arange(12), 12)
    assert torch.equal(same.fit_rows, FIT) and same.weight_decay == 1e-4


def test_noise_may_still_come_from_the_rows_left_out():
    X, Y, net = inputs(), targets("gaussian", inputs()), network()
    run = training_run(net)
    run = dataclasses.replace(run, validation_variance=run.residual_variance + 0.1)
    model = LinearizedGP.from_fit(run, X, Y, rows="fit", parameters="last_layer")
    assert model.noise_variance.item() == pytest.approx(0.3)


def test_what_the_rows_cannot_give_is_refused():
    X, Y, run = inputs(), targets("gaussian", inputs()), training_run(network())
    with pytest.raises(ValueError, match="rows must be one of 'all', 'fit', but is 'v"):
        LinearizedGP.from_fit(run, X, Y, rows="validation")
    with pytest.raises(ValueError, match="which rows='fit' leaves out. Pass rows='all"):
        LinearizedGP.from_fit(run, X, Y, rows="fit", select="validation")
    for rows in ("all", "fit"):
        with pytest.raises(ShapeError, match="names row 11, but train_X has 9 rows"):
            LinearizedGP.from_fit(run, X[:9], Y[:9], rows=rows)
    with pytest.raises(ShapeError, match="must agree, but train_X has 12, train_Y has"):
        LinearizedGP.from_fit(run, X, Y[:10], rows="fit")
    with pytest.raises(TypeError, match="train_X must be a torch.Tensor"):
        LinearizedGP.from_fit(run, X.tolist(), Y)


@pytest.mark.parametrize("name", ["softmax", "logistic"])
@pytest.mark.filterwarnings("ignore:calibrate keeps")
def test_rows_conditioned_on_do_not_calibrate(name):
    m = 3 if name == "softmax" else 1
    X, Y, net = inputs(), targets(name, inputs()), network(m)
    run = training_run(net, None)
    model = LinearizedGP.from_fit(run, X, Y)
    with pytest.raises(ValueError, match=r"All 4 rows .*rows='fit'.* .*subset_rows"):
        model.calibrate(X[HELD_OUT], Y[HELD_OUT])
    assert model.calibration is None
    # Both ways out that the message names, and rows of which some are new.
    LinearizedGP.from_fit(run, X, Y, rows="fit").calibrate(X[HELD_OUT], Y[HELD_OUT])
    model.subset_rows(FIT).calibrate(X[HELD_OUT], Y[HELD_OUT])
    new, labels = inputs(4, seed=9), Y[:4]
    mixed = torch.cat([X[HELD_OUT], new]), torch.cat([Y[HELD_OUT], labels])
    with pytest.raises(
        ValueError, match="4 of 5 rows of X_val are rows that the model"
    ):
        model.calibrate(mixed[0][:5], mixed[1][:5])
    with pytest.warns(
        UserWarning, match="4 of 8 rows of X_val are rows that the model"
    ):
        model.calibrate(*mixed)
    model.calibrate(new, labels)  # silent: warnings are errors


@pytest.mark.parametrize("mean", ["network", "auto"])
def test_labels_have_no_noise_to_choose(mean):
    X, Y, net = inputs(), targets("softmax", inputs()), network(3)
    run = training_run(net, None)
    options = {"mean": mean, "parameters": "last_layer"}
    assert LinearizedGP.from_fit(run, X, Y, **options).noise == "learn"
    with pytest.raises(
        ValueError, match="noise is for regression, but came as 'fit_re"
    ):
        LinearizedGP.from_fit(run, X, Y, noise="fit_residual")


def test_labels_conditioned_on_later_do_not_calibrate_either():
    model = build("softmax")
    X, Y = inputs(4, seed=9), targets("softmax", inputs(4, seed=9))
    with pytest.raises(ValueError, match="All 4 rows of X_val are rows that the model"):
        model.condition_on_observations(X, Y).calibrate(X, Y)
