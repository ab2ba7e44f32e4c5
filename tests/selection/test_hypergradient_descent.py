"""The loop over hyperparameters: minima in closed form, resuming, what it survives."""

import pytest
import torch

from gpbridge.checks import NotConvergedWarning
from gpbridge.dnn.divergence import DivergedError
from gpbridge.selection import (
    CompositeLoss,
    HypergradientDescent,
    LBFGSTraining,
    NeumannSeries,
)
from gpbridge.selection.loss_curvature import (
    CurvatureOperator,
    relative_inner_gradient,
)
from gpbridge.solvers import ConjugateGradients
from gpbridge.storage import load_state, save_state
from tests import oracles_selection as closed
from tests.selection.test_hypergradient import ridge_data

DATA = ridge_data(n=12, d=5, seed=3)
X, y, X_VAL, Y_VAL = DATA
START = {"w": torch.zeros(5).double()}


def train_loss(params, hparams):
    penalty = 0.5 * (hparams["log_decay"].exp() * params["w"].square()).sum()
    return 0.5 * (X @ params["w"] - y).square().mean() + penalty


def val_loss(params, hparams):
    return 0.5 * (X_VAL @ params["w"] - Y_VAL).square().mean()


def descent(log_decay=-3.0, **options):
    start = {"log_decay": torch.tensor(log_decay).double()}
    return HypergradientDescent(train_loss, val_loss, START, start, **options)


def by_grid():
    grid = torch.linspace(-6, 1, 141).double()
    losses = torch.stack(
        [val_loss({"w": closed.ridge_weights(X, y, d.exp())}, {}) for d in grid]
    )
    assert 0 < losses.argmin() < 140
    return grid[losses.argmin()], losses.min()


def test_the_decay_of_a_ridge_is_that_of_a_fine_grid():
    best_decay, least = by_grid()
    loop = descent(learning_rate=0.3)
    history = loop.run(80, tolerance=1e-3, progress=False)
    assert len(history) < 80  # it stopped by itself
    found = loop.best.step.hparams["log_decay"]
    assert abs(float(found - best_decay)) < 0.1
    assert loop.best.step.val_loss == pytest.approx(float(least), abs=1e-4)
    exact = closed.ridge_weights(X, y, found.exp())
    torch.testing.assert_close(loop.best.params["w"], exact, rtol=1e-3, atol=1e-4)
    assert loop.best.step.val_loss == min(step.val_loss for step in history)


def test_warm_starts_save_work():
    loop = descent(learning_rate=1e-5)
    work = []

    def train(loss, params, hparams, batches):
        counted = []

        def counting(*arguments):
            counted.append(1)
            return loss(*arguments)

        found = LBFGSTraining()(counting, params, hparams, batches)
        work.append(len(counted))
        return found

    loop.train = train
    loop.run(6, progress=False)
    assert 3 * max(work[1:]) < work[0]


def equal(one, other):
    torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("done", [0, 3])
def test_an_interrupted_run_resumes_to_the_same_bits(done, tmp_path):
    # So loose that where training and solves start shows in what they end at.
    options = {
        "train": LBFGSTraining(tolerance=0.05),
        "inner_tolerance": 0.5,
        "solver": ConjugateGradients(tolerance=0.1, preconditioner_rank=0),
    }
    whole = descent(**options)
    whole.run(7, progress=False)
    first = descent(**options)
    if done:
        first.run(done, progress=False)
    save_state(first.state_dict(), tmp_path / "state")
    state = load_state(tmp_path / "state")
    second = descent(0.5, **options)
    second.load_state_dict(state)
    second.run(7 - done, progress=False)
    equal(second.params, whole.params)
    equal(second.hparams["log_decay"].detach(), whole.hparams["log_decay"].detach())
    assert second.trace("val_loss").tolist() == whole.trace("val_loss").tolist()
    equal(second.best.params, whole.best.params)
    third = descent(**options)  # the state was not written to by the run
    third.load_state_dict(state)
    third.run(7 - done, progress=False)
    equal(third.params, whole.params)


def test_a_snapshot_is_not_changed_by_later_steps():
    loop = descent()
    loop.run(2, progress=False)
    state = loop.state_dict()
    copy = torch.utils._pytree.tree_map(
        lambda v: v.clone() if isinstance(v, torch.Tensor) else v, state
    )
    loop.run(2, progress=False)
    equal(state["hparams"], copy["hparams"])
    equal(state["optimizer"]["state"], copy["optimizer"]["state"])
    equal(state["params"], copy["params"])


def test_the_history_has_columns_to_plot():
    decays = {"log_decay": torch.full((5,), -3.0).double()}
    loop = HypergradientDescent(train_loss, val_loss, START, decays)
    loop.run(4, progress=False)
    assert loop.trace("val_loss").shape == (4,)
    assert loop.trace("log_decay").shape == (4, 5)
    assert loop.trace("log_decay")[0].tolist() == [-3.0] * 5
    assert (loop.trace("relative_inner_gradient") < 1e-3).all()
    with pytest.raises(ValueError, match="name must be one of log_decay, val_loss"):
        loop.trace("hparams")


def test_what_was_given_is_left_as_it_was():
    start = {"log_decay": torch.tensor(-3.0).double()}
    loop = HypergradientDescent(train_loss, val_loss, START, start)
    loop.run(2, progress=False)
    assert start["log_decay"] == -3.0 and not start["log_decay"].requires_grad
    assert not START["w"].any()


def test_a_loss_that_is_not_finite_keeps_the_last_good_state():
    def breaks(params, hparams):
        limit = torch.where(hparams["log_decay"] > -2.65, torch.nan, 1.0)
        return val_loss(params, hparams) * limit

    start = {"log_decay": torch.tensor(-3.0).double()}
    loop = HypergradientDescent(train_loss, breaks, START, start)
    with pytest.raises(DivergedError, match="not finite.*val_loss is nan") as caught:
        loop.run(20, progress=False)
    assert caught.value.last_good is loop
    assert 1 < len(loop.history) < 20
    last = loop.history[-1]
    equal(loop.hparams["log_decay"].detach(), last.hparams["log_decay"])
    exact = closed.ridge_weights(X, y, last.hparams["log_decay"].exp())
    torch.testing.assert_close(loop.params["w"], exact, rtol=1e-2, atol=1e-3)
    assert all(torch.isfinite(loop.trace("val_loss")))


def test_a_run_goes_on_after_a_step_that_was_too_large():
    def breaks(params, hparams):
        limit = torch.where(hparams["log_decay"] > -2.65, torch.nan, 1.0)
        return val_loss(params, hparams) * limit

    start = {"log_decay": torch.tensor(-3.0).double()}
    loop = HypergradientDescent(train_loss, breaks, START, start)
    message = r"the learning rate is 0.01 \(it was 0.1\): call run to go on"
    with pytest.raises(DivergedError, match=message):
        loop.run(20, progress=False)
    before = [float(step.hparams["log_decay"]) for step in loop.history]
    loop.run(2, progress=False)
    after = [float(step.hparams["log_decay"]) for step in loop.history]
    # The last record was made again, and no value stands twice.
    assert after[:-1] == before and len(set(after)) == len(after)
    assert 0 < after[-1] - after[-2] <= 0.011
    bad = HypergradientDescent(
        train_loss, breaks, START, {"log_decay": torch.zeros(()).double()}
    )
    for _ in range(2):
        with pytest.raises(DivergedError, match="Start at other hyperparameters"):
            bad.step()


def test_training_is_judged_by_the_curvature_of_the_hypergradient():
    loss = CompositeLoss(
        lambda p, h: torch.tanh(p["w"]),
        lambda f, p, h: (f - 2).square().sum() + h["a"] * p["w"].square().sum(),
    )
    start = {"w": torch.ones(3).double()}
    h = {"a": torch.tensor(0.1).double()}
    theta = 0.2 * torch.ones(3).double()
    relative = {}
    for curvature in ("ggn", "hessian"):
        operator = CurvatureOperator(
            theta,
            theta.new_zeros(()),
            like=start,
            hparams=h,
            loss=loss,
            curvature=curvature,
        )
        slope = torch.func.grad(lambda w: loss({"w": w}, h))(theta)
        relative[curvature] = relative_inner_gradient(operator, slope)
        train = LBFGSTraining(curvature=curvature, tolerance=0.86)
        theta.grad = slope
        found = train._converged(loss, theta, start, h, None)
        assert found == (relative[curvature] <= 0.86)
    assert relative["hessian"] < 0.86 < relative["ggn"]
    made = HypergradientDescent(loss, loss, start, h, curvature="ggn")
    assert made.train.curvature == "ggn"
    with pytest.raises(ValueError, match="curvature must be one of"):
        LBFGSTraining(curvature="fisher")


def test_training_that_does_not_converge_is_one_warning_per_run():
    loop = descent(train=lambda loss, params, hparams, batches: params)
    with pytest.warns(NotConvergedWarning, match="In 3 of 3 steps the inner") as caught:
        loop.run(3, progress=False)
    assert len(caught) == 1


def test_solves_that_do_not_converge_are_one_warning_per_run():
    loop = descent(-5.0, solver=NeumannSeries(0))
    with pytest.warns(NotConvergedWarning, match="In 3 of 3 steps the linear solve"):
        loop.run(3, progress=False)


def test_batches_are_passed_on():
    def by_batch(params, hparams, batch):
        penalty = 0.5 * (hparams["log_decay"].exp() * params["w"].square()).sum()
        return 0.5 * (batch[0] @ params["w"] - batch[1]).square().mean() + penalty

    def held_out(params, hparams, batch):
        return 0.5 * (batch[0] @ params["w"] - batch[1]).square().mean()

    start = {"log_decay": torch.tensor(-3.0).double()}
    loop = HypergradientDescent(
        by_batch,
        held_out,
        START,
        start,
        train_batches=[(X[:5], y[:5]), (X[5:], y[5:])],
        val_batches=[(X_VAL, Y_VAL)],
    )
    whole = descent()
    loop.run(3, progress=False)
    whole.run(3, progress=False)
    torch.testing.assert_close(
        loop.trace("val_loss"), whole.trace("val_loss"), rtol=1e-5, atol=0.0
    )


def test_states_of_something_else_are_refused():
    loop = descent()
    with pytest.raises(ValueError, match="state lacks best, history"):
        loop.load_state_dict({"params": {}})
    state = loop.state_dict()
    state["params"] = {"w": torch.zeros(4)}
    with pytest.raises(ValueError, match=r"other params: it has {'w': \(4,\)}"):
        loop.load_state_dict(state)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: descent(learning_rate=0.0), "learning_rate must be positive"),
        (lambda: descent().run(0), "num_steps must be a whole number"),
        (lambda: descent().run(tolerance=-1.0), "tolerance must be positive"),
        (lambda: LBFGSTraining(tolerance=1.0), "tolerance must be below 1"),
        (lambda: LBFGSTraining(max_iterations=0), "max_iterations must be a whole"),
    ],
)
def test_bad_options_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_ends_at_the_minimum(dtype):
    hparams = {"log_decay": torch.tensor(-3.0, dtype=dtype)}

    def loss(params, hparams):
        penalty = 0.5 * hparams["log_decay"].exp() * params["w"].square().sum()
        return 0.5 * (X.to(dtype) @ params["w"] - y.to(dtype)).square().mean() + penalty

    start = {"w": torch.zeros(5, dtype=dtype)}
    found = LBFGSTraining(1e-4)(loss, start, hparams)["w"]
    exact = closed.ridge_weights(X, y, torch.tensor(-3.0).double().exp())
    assert found.dtype == dtype and not start["w"].any()
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-3)


def test_training_of_a_loss_that_breaks_returns_what_was_finite():
    def loss(params, hparams):
        w = params["w"]
        return torch.where(w.norm() > 1, torch.nan, -w.square().sum() - w.sum())

    start = {"w": torch.zeros(2).double()}
    found = LBFGSTraining()(loss, start, {})
    assert torch.isfinite(found["w"]).all() and found["w"].norm() <= 1
