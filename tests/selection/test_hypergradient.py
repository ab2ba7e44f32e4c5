"""Hypergradients: closed forms, retrained networks, leave-one-out, what is refused."""

import copy
import pickle

import gpytorch
import pytest
import torch
from botorch.exceptions.errors import InputDataError
from gpytorch.mlls import LeaveOneOutPseudoLikelihood
from torch import nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call
from torch.nn import functional as F

from gpbridge.checks import NotConvergedWarning, ShapeError
from gpbridge.selection import (
    CompositeLoss,
    LBFGSTraining,
    NeumannSeries,
    hypergradient,
)
from gpbridge.selection.hypergradient import NonFiniteLossError
from gpbridge.solvers import Cholesky, ConjugateGradients
from gpbridge.solvers.factors import IndefiniteError
from gpbridge.testing import assert_module_unchanged
from gpbridge.types import Solution
from tests import oracles_selection as closed

TIGHT = ConjugateGradients(tolerance=1e-12, preconditioner_rank=0)
SOLVERS = {
    "default": None,
    "cg": TIGHT,
    "preconditioned": ConjugateGradients(tolerance=1e-12),
    "cholesky": Cholesky(),
    "neumann": NeumannSeries(num_terms=100),
}


def ridge_data(n=40, d=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(d, generator=generator, dtype=dtype)
    parts = []
    for rows in (n, n // 2):
        X = torch.randn(rows, d, generator=generator, dtype=dtype)
        noise = torch.randn(rows, generator=generator, dtype=dtype)
        parts += [X, X @ w + 0.5 * noise]
    return parts


def ridge_losses(X, y, X_val, y_val):
    def train_loss(params, hparams):
        penalty = 0.5 * (hparams["decay"] * params["w"].square()).sum()
        return 0.5 * (X @ params["w"] - y).square().mean() + penalty

    def val_loss(params, hparams):
        return 0.5 * (X_val @ params["w"] - y_val).square().mean()

    return train_loss, val_loss


def ridge(decay, data, **options):
    w = closed.ridge_weights(data[0].double(), data[1].double(), decay.double())
    losses = ridge_losses(*data)
    return hypergradient(*losses, {"w": w.to(data[0])}, {"decay": decay}, **options)


@pytest.mark.parametrize("solver", SOLVERS)
def test_per_feature_ridge_is_the_closed_form(solver):
    data = ridge_data()
    decay = torch.linspace(0.05, 0.8, 5).double()
    options = {} if SOLVERS[solver] is None else {"solver": SOLVERS[solver]}
    found = ridge(decay, data, **options)
    exact = closed.ridge_hypergradient(*data, decay)
    scale = exact.abs().max()
    error = (found.grads["decay"] - exact).abs().max() / scale
    assert error < (1e-4 if solver == "default" else 1e-6)
    assert found.converged and found.residual < 1e-4
    assert found.relative_inner_gradient < 1e-12
    assert found.direct["decay"].count_nonzero() == 0


def test_one_decay_has_the_sum_of_the_gradients_of_many():
    data = ridge_data()
    decay = torch.tensor(0.3).double()
    found = ridge(decay, data, solver=TIGHT)
    exact = closed.ridge_hypergradient(*data, decay).sum()
    torch.testing.assert_close(found.grads["decay"], exact, rtol=1e-6, atol=0.0)


def test_the_gauss_newton_matrix_of_a_linear_model_is_its_hessian():
    X, y, X_val, y_val = data = ridge_data()
    decay = torch.full((5,), 0.2).double()
    composite = CompositeLoss(
        lambda params, hparams: X @ params["w"],
        lambda f, params, hparams: (
            0.5 * (f - y).square().mean()
            + 0.5 * (hparams["decay"] * params["w"].square()).sum()
        ),
    )
    w = closed.ridge_weights(X, y, decay)
    _, val_loss = ridge_losses(*data)
    found = hypergradient(
        composite,
        val_loss,
        {"w": w},
        {"decay": decay},
        curvature="ggn",
        solver=TIGHT,
    )
    exact = closed.ridge_hypergradient(*data, decay)
    torch.testing.assert_close(found.grads["decay"], exact, rtol=1e-6, atol=1e-12)


def test_batches_give_what_all_data_give():
    X, y, X_val, y_val = data = ridge_data(n=42)
    decay = torch.full((5,), 0.2).double()
    whole = ridge(decay, data, solver=TIGHT)

    def train_loss(params, hparams, batch):
        penalty = 0.5 * (hparams["decay"] * params["w"].square()).sum()
        return 0.5 * (batch[0] @ params["w"] - batch[1]).square().mean() + penalty

    def val_loss(params, hparams, batch):
        misfit = batch["X"] @ params["w"] - batch["y"]
        return 0.5 * misfit.square().mean()

    rows = torch.utils.data.TensorDataset(X, y)
    split = torch.arange(21).split(8)
    found = hypergradient(
        train_loss,
        val_loss,
        {"w": closed.ridge_weights(X, y, decay)},
        {"decay": decay},
        solver=TIGHT,
        train_batches=torch.utils.data.DataLoader(rows, batch_size=10),
        val_batches=[{"X": X_val[i], "y": y_val[i]} for i in split],
    )
    torch.testing.assert_close(found.grads["decay"], whole.grads["decay"])
    assert found.val_loss == pytest.approx(whole.val_loss, rel=1e-12)
    assert found.train_loss == pytest.approx(whole.train_loss, rel=1e-12)


def test_a_hyperparameter_of_the_held_out_loss_has_its_direct_term():
    X, y, X_val, y_val = data = ridge_data()
    train_loss, val_loss = ridge_losses(*data)
    decay, scale = torch.tensor(0.3).double(), torch.tensor(1.7).double()

    def scaled(params, hparams):
        return hparams["scale"] * val_loss(params, hparams) + hparams["decay"] ** 2

    w = closed.ridge_weights(X, y, decay)
    hparams = {"decay": decay, "scale": scale}
    found = hypergradient(train_loss, scaled, {"w": w}, hparams, solver=TIGHT)
    plain = val_loss({"w": w}, hparams)
    torch.testing.assert_close(found.grads["scale"], plain)
    torch.testing.assert_close(found.direct["scale"], plain)
    exact = scale * closed.ridge_hypergradient(*data, decay).sum() + 2 * decay
    torch.testing.assert_close(found.grads["decay"], exact, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(found.direct["decay"], 2 * decay)


def test_damping_is_that_of_the_curvature():
    X, y, X_val, y_val = data = ridge_data()
    decay = torch.tensor(0.1).double()
    w = closed.ridge_weights(X, y, decay)
    found = ridge(decay, data, damping=0.5, solver=TIGHT)
    slope = X_val.mT @ (X_val @ w - y_val) / len(X_val)
    H = closed.ridge_hessian(X, decay + 0.5)
    torch.testing.assert_close(
        found.grads["decay"], -w @ torch.linalg.solve(H, slope), rtol=1e-6, atol=0.0
    )


class Nested(nn.Module):
    """Modules inside modules, batch norm and dropout, a weight used twice."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh())
        self.drop = nn.Dropout(0.5)
        self.head = nn.ModuleDict({"out": nn.Linear(3, 2)})

    def forward(self, x):
        h = self.body(x)
        return self.head["out"](self.drop(h + torch.tanh(h)))


def classification(network, decay_of):
    """Losses of a module, and what a change of the decay does after retraining."""
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(40, 2, generator=generator).double()
    y = (X[:, 0] + 0.5 * torch.randn(40, generator=generator).double() > 0).long()

    def outputs(params, hparams):
        return functional_call(network, params, (X[:25],))

    def loss(f, params, hparams):
        decays = decay_of(params, hparams)
        penalty = sum(d * p.square().sum() for d, p in decays)
        return F.cross_entropy(f, y[:25]) + 0.5 * penalty

    def val_loss(params, hparams):
        return F.cross_entropy(functional_call(network, params, (X[25:],)), y[25:])

    return CompositeLoss(outputs, loss), val_loss


def minimum(train_loss, params, hparams):
    """By L-BFGS, then Newton steps, which end at round-off in the gradient."""
    params = LBFGSTraining(1e-4, 1000)(train_loss, params, hparams)
    shapes = {k: p.shape for k, p in params.items()}

    def named(theta):
        parts = theta.split([shape.numel() for shape in shapes.values()])
        pairs = zip(shapes.items(), parts, strict=True)
        return {k: part.reshape(shape) for (k, shape), part in pairs}

    theta = torch.cat([p.reshape(-1) for p in params.values()])
    for _ in range(4):
        g = jacobian(lambda t: train_loss(named(t), hparams), theta)
        H = hessian(lambda t: train_loss(named(t), hparams), theta)
        theta = theta - torch.linalg.solve(H, g)
    return named(theta)


def difference(losses, params, hparams, name, index=(), eps=1e-4):
    """Central difference of the held-out loss through training to the minimum."""
    train_loss, val_loss = losses
    values = []
    for sign in (1, -1):
        moved = {k: h.clone() for k, h in hparams.items()}
        moved[name][index] += sign * eps
        values.append(val_loss(minimum(train_loss, params, moved), moved))
    return (values[0] - values[1]) / (2 * eps)


@pytest.mark.parametrize("solver", ["cg", "cholesky"])
def test_logistic_regression_agrees_with_retraining(solver):
    network = nn.Linear(2, 2).double()
    losses = classification(
        network, lambda params, h: [(h["log_decay"].exp(), params["weight"])]
    )
    params = {"weight": network.weight.detach()}  # the bias stays as it is
    hparams = {"log_decay": torch.tensor(-3.0).double()}
    with assert_module_unchanged(network):
        best = minimum(losses[0], params, hparams)
        found = hypergradient(*losses, best, hparams, solver=SOLVERS[solver])
        expected = difference(losses, best, hparams, "log_decay")
    torch.testing.assert_close(found.grads["log_decay"], expected, rtol=1e-5, atol=0.0)


def test_a_nested_network_in_eval_mode_agrees_with_retraining():
    network = Nested().double()
    with torch.no_grad():
        network(torch.randn(50, 2).double())  # statistics of its own
    network.eval()

    def decays(params, h):
        return [
            (h["log_decay"].exp()[int(k.startswith("head"))], p)
            for k, p in params.items()
        ]

    losses = classification(network, decays)
    params = {k: p.detach() for k, p in network.named_parameters()}
    hparams = {"log_decay": torch.tensor([-3.0, -2.0]).double()}
    with assert_module_unchanged(network):
        best = minimum(losses[0], params, hparams)
        found = hypergradient(*losses, best, hparams, solver=TIGHT)
    for g in range(2):
        expected = difference(losses, best, hparams, "log_decay", g)
        got = found.grads["log_decay"][g]
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)


def test_leave_one_out_agrees_with_gpytorch():
    """Rasmussen and Williams (2006), eqs. (5.10) to (5.12), as a held-out loss.

    The inner problem is the dual one, whose minimum is alpha = (K + noise I)^-1 y; the
    variances of the left-out points depend on the hyperparameters directly.
    """
    generator = torch.Generator().manual_seed(0)
    X = torch.rand(12, 1, generator=generator).double()
    y = torch.sin(6 * X[:, 0]) + 0.1 * torch.randn(12, generator=generator).double()

    class GP(gpytorch.models.ExactGP):
        def __init__(self, likelihood):
            super().__init__(X, y, likelihood)
            self.mean_module = gpytorch.means.ZeroMean()
            self.covar_module = gpytorch.kernels.RBFKernel()

        def forward(self, x):
            return gpytorch.distributions.MultivariateNormal(
                self.mean_module(x), self.covar_module(x)
            )

    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    model = GP(likelihood).double()
    model.covar_module.lengthscale, likelihood.noise = 0.3, 0.02
    model.train()
    objective = LeaveOneOutPseudoLikelihood(likelihood, model)
    (-objective(model(X), y)).backward()

    noise_floor = likelihood.noise_covar.raw_noise_constraint.lower_bound

    def covariance(hparams):
        scaled = X / F.softplus(hparams["lengthscale"])
        K = torch.exp(-0.5 * (scaled - scaled.mT).square())
        noise = F.softplus(hparams["noise"]) + noise_floor
        return K + noise * torch.eye(12).double()

    def train_loss(params, hparams):
        alpha = params["alpha"]
        return 0.5 * alpha @ covariance(hparams) @ alpha - y @ alpha

    def val_loss(params, hparams):
        variance = 1 / torch.linalg.inv(covariance(hparams)).diagonal()
        mean = y - params["alpha"] * variance
        return -torch.distributions.Normal(mean, variance.sqrt()).log_prob(y).mean()

    raw = {
        "lengthscale": model.covar_module.raw_lengthscale,
        "noise": likelihood.noise_covar.raw_noise,
    }
    hparams = {k: p.detach().reshape(()) for k, p in raw.items()}
    alpha = torch.linalg.solve(covariance(hparams), y)
    found = hypergradient(
        train_loss, val_loss, {"alpha": alpha}, hparams, solver=Cholesky()
    )
    for name, p in raw.items():
        expected = p.grad.reshape(())
        assert found.direct[name] != 0
        torch.testing.assert_close(found.grads[name], expected, rtol=1e-6, atol=1e-9)


def test_float32_follows_the_input():
    data = ridge_data(dtype=torch.float32)
    decay = torch.full((5,), 0.2)
    found = ridge(decay, data)
    assert found.grads["decay"].dtype == torch.float32
    exact = closed.ridge_hypergradient(
        *(part.double() for part in data), decay.double()
    )
    torch.testing.assert_close(
        found.grads["decay"].double(), exact, rtol=1e-3, atol=1e-4
    )


def test_the_solution_starts_the_next_solve():
    data = ridge_data(d=5)
    decay = torch.linspace(0.05, 0.8, 5).double()
    first = ridge(decay, data)
    again = ridge(decay, data, initial=first.solution)
    assert again.iterations == 0 < first.iterations
    torch.testing.assert_close(again.grads, first.grads)


def test_the_distance_to_the_minimum_is_reported_and_warned_of():
    X, y, X_val, y_val = data = ridge_data()
    decay = torch.tensor(0.3).double()
    train_loss, val_loss = ridge_losses(*data)
    w = closed.ridge_weights(X, y, decay)
    H = closed.ridge_hessian(X, decay)
    away = 1e-4 * torch.arange(1, 6).double()
    hparams = {"decay": decay}
    near = hypergradient(train_loss, val_loss, {"w": w + away}, hparams, solver=TIGHT)
    assert near.inner_gradient_norm == pytest.approx(float((H @ away).norm()))
    relative = float((H @ away).norm() / (H @ w).norm())
    assert near.relative_inner_gradient == pytest.approx(relative)
    change = val_loss({"w": w}, hparams) - val_loss({"w": w + away}, hparams)
    assert near.expected_val_change == pytest.approx(float(change), rel=1e-2)
    with pytest.warns(NotConvergedWarning, match="inner training has not converged"):
        at_zero = hypergradient(train_loss, val_loss, {"w": 0 * w}, hparams)
    assert at_zero.relative_inner_gradient == pytest.approx(1.0)
    hypergradient(train_loss, val_loss, {"w": 0 * w}, hparams, inner_tolerance=2.0)


def test_the_relative_inner_gradient_has_no_units():
    data = ridge_data()
    train_loss, val_loss = ridge_losses(*data)
    w = closed.ridge_weights(data[0], data[1], torch.tensor(0.3).double())
    hparams = {"decay": torch.tensor(0.31).double()}
    plain = hypergradient(train_loss, val_loss, {"w": w}, hparams, inner_tolerance=1.0)
    other = hypergradient(
        lambda p, h: 1e6 * train_loss({"w": 1e-3 * p["w"]}, h),
        lambda p, h: val_loss({"w": 1e-3 * p["w"]}, h),
        {"w": 1e3 * w},
        hparams,
        inner_tolerance=1.0,
    )
    got = other.relative_inner_gradient
    assert got == pytest.approx(plain.relative_inner_gradient)
    torch.testing.assert_close(other.grads, plain.grads, rtol=1e-3, atol=0.0)


def test_damping_does_not_hide_that_training_has_not_converged():
    train_loss, val_loss = ridge_losses(*ridge_data())
    hparams = {"decay": torch.tensor(0.3).double()}
    w = {"w": torch.full((5,), 0.1).double()}
    losses = (lambda p, h: 1e-3 * train_loss(p, h)), val_loss
    plain, damped = (
        hypergradient(*losses, w, hparams, damping=damping, inner_tolerance=10.0)
        for damping in (0.0, 10.0)
    )
    assert damped.relative_inner_gradient == pytest.approx(
        plain.relative_inner_gradient
    )
    with pytest.warns(NotConvergedWarning, match="inner training has not converged"):
        hypergradient(*losses, w, hparams, damping=10.0)


def test_any_function_that_says_that_it_did_not_converge_is_a_solver():
    def one_step(operator, rhs, initial=None):
        return Solution(0.1 * rhs, 0.9, 1, False)

    with pytest.warns(NotConvergedWarning, match="one_step stopped after 1 .* 9.0e-01"):
        found = ridge(torch.tensor(0.3).double(), ridge_data(), solver=one_step)
    assert not found.converged


def test_a_solve_that_stops_early_is_warned_of_with_its_true_residual():
    data = ridge_data()
    decay = torch.tensor(0.01).double()
    short = ConjugateGradients(tolerance=1e-8, max_iterations=2, preconditioner_rank=0)
    with pytest.warns(NotConvergedWarning, match="hypergradient is approximate"):
        found = ridge(decay, data, solver=short)
    assert not found.converged and found.iterations == 2
    X, y, X_val, y_val = data
    w = closed.ridge_weights(X, y, decay)
    slope = X_val.mT @ (X_val @ w - y_val) / len(X_val)
    left = slope - closed.ridge_hessian(X, decay) @ found.solution["w"]
    assert found.residual == pytest.approx(float(left.norm() / slope.norm()), rel=1e-6)


@pytest.mark.parametrize("solver", ["cg", "cholesky", "neumann"])
def test_negative_curvature_is_named_with_its_remedies(solver):
    w = {"w": torch.zeros(2).double()}
    hparams = {"h": torch.ones(()).double()}
    composite = CompositeLoss(
        lambda p, h: p["w"].square(),
        lambda f, p, h: 0.5 * (f - h["h"]).square().sum(),  # a maximum at zero
    )
    losses = composite, lambda p, h: (p["w"] - h["h"]).sum()
    with pytest.raises(IndefiniteError, match="negative curvature.*curvature='ggn'"):
        hypergradient(*losses, w, hparams, solver=SOLVERS[solver], inner_tolerance=9.0)
    found = hypergradient(
        *losses, w, hparams, curvature="ggn", damping=1.0, inner_tolerance=9.0
    )
    assert found.grads["h"] == -2.0


def test_the_curvature_of_a_loss_that_is_not_composite_has_no_ggn():
    data = ridge_data()
    with pytest.raises(
        TypeError, match=r"CompositeLoss\(outputs, loss\), not function"
    ):
        ridge(torch.tensor(0.3).double(), data, curvature="ggn")


def call(**changes):
    data = ridge_data()
    train_loss, val_loss = ridge_losses(*data)
    decay = torch.tensor(0.3).double()
    arguments = {
        "train_loss": train_loss,
        "val_loss": val_loss,
        "params": {"w": closed.ridge_weights(*data[:2], decay)},
        "hparams": {"decay": decay},
        **changes,
    }
    return hypergradient(**arguments)


ONE = torch.ones(()).double()
BAD = {
    "a wrong name": (
        {"hparams": {"decoy": ONE}},
        ValueError,
        r"train_loss looked up 'decay', .*hparams \(decoy\)",
    ),
    "a hyperparameter without effect": (
        {"hparams": {"decay": 0.3 * ONE, "idle": ONE}},
        ValueError,
        "hparams idle have no effect",
    ),
    "a parameter without effect": (
        {"params": {"w": torch.ones(5).double(), "extra": ONE}},
        ValueError,
        "train_loss does not depend on params extra",
    ),
    "NaN in a parameter": (
        {"params": {"w": torch.full((5,), torch.nan).double()}},
        InputDataError,
        "NaN or Inf",
    ),
    "NaN in a hyperparameter": (
        {"hparams": {"decay": torch.nan * ONE}},
        InputDataError,
        "NaN or Inf",
    ),
    "NaN in a loss": (
        {"val_loss": lambda p, h: (p["w"].sum() - 1e9).log()},
        NonFiniteLossError,
        "val_loss is nan",
    ),
    "a loss per point": (
        {"val_loss": lambda p, h: p["w"]},
        ShapeError,
        r"val_loss must return one number, but returned shape \(5,\)",
    ),
    "a loss that is a number": (
        {"val_loss": lambda p, h: 1.0},
        TypeError,
        "val_loss must return a tensor, but returned float",
    ),
    "no dict": ({"params": nn.Linear(1, 1)}, TypeError, "dict of tensors by name"),
    "an empty dict": ({"hparams": {}}, ValueError, "hparams is empty"),
    "a float": ({"hparams": {"decay": 0.3}}, TypeError, "torch.as_tensor"),
    "two dtypes": (
        {"params": {"w": torch.ones(5).double(), "v": torch.ones(1)}},
        TypeError,
        "must share one dtype",
    ),
    "negative damping": ({"damping": -1.0}, ValueError, "zero or positive, but is -1"),
    "another curvature": ({"curvature": "fisher"}, ValueError, "'hessian', 'ggn'"),
    "another start": (
        {"initial": {"v": ONE}},
        ValueError,
        "initial must have the names of params, w, but has v",
    ),
    "no batches": (
        {"train_loss": lambda p, h, b: p["w"].sum(), "train_batches": []},
        ValueError,
        "The batches of train_loss have no rows",
    ),
    "a batch of words": (
        {"train_loss": lambda p, h, b: p["w"].sum(), "train_batches": ["a"]},
        TypeError,
        "A batch must be a tensor",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    changes, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        call(**changes)


def test_the_record_is_read_pickled_and_copied():
    found = call()
    assert "relative inner gradient" in repr(found) and "decay" in repr(found)
    for again in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found)):
        torch.testing.assert_close(again.grads, found.grads)


def test_the_arguments_are_left_as_they_were():
    w = closed.ridge_weights(*ridge_data()[:2], ONE).requires_grad_()
    decay = ONE.clone().requires_grad_()
    found = call(params={"w": w}, hparams={"decay": decay})
    assert w.grad is None and decay.grad is None
    assert not found.grads["decay"].requires_grad
    with torch.no_grad():
        inside = call(params={"w": w}, hparams={"decay": decay})
    torch.testing.assert_close(inside.grads, found.grads)
