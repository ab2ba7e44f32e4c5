"""Weight decays and augmentation of a network: retraining, ridge, what is untouched."""

import copy
import pickle

import pytest
import torch
from botorch.exceptions.errors import InputDataError
from torch import nn

from gpbridge.checks import ShapeError
from gpbridge.selection import (
    HeldOutProblem,
    LBFGSTraining,
    RowAugmentation,
    input_noise,
)
from gpbridge.testing import assert_module_unchanged
from tests import oracles_selection as closed
from tests.selection.test_hypergradient import Nested, difference, minimum, ridge_data


def rows(n=30, seed=1):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, 2, generator=generator).double()
    noise = torch.randn(n, generator=generator).double()
    return X, (X[:, 0] + 0.5 * noise > 0).long()


def nested():
    network = Nested().double()
    with torch.no_grad():
        network(torch.randn(50, 2).double())  # statistics; it stays in train mode
    return network


def problem(network=None, **options):
    network = nested() if network is None else network
    options = {"weight_decay": 0.05, **options}
    return HeldOutProblem(network, *rows(), *rows(20, seed=2), **options)


def test_a_linear_network_is_ridge_regression():
    X, y, X_val, y_val = ridge_data()
    network = nn.Linear(5, 1, bias=False).double()
    held_out = HeldOutProblem(
        network, X, y[:, None], X_val, y_val[:, None], weight_decay=0.3
    )
    decay = torch.tensor(0.3).double()
    w = {"weight": closed.ridge_weights(X, y, decay)[None]}
    found = held_out.hypergradient(w)
    exact = decay * closed.ridge_hypergradient(X, y, X_val, y_val, decay).sum()
    torch.testing.assert_close(
        found.grads["log_weight_decay"], exact[None], rtol=1e-3, atol=0.0
    )


def test_input_noise_of_a_linear_network_is_a_weight_decay():
    """In the limit of many copies; Bishop (1995), Training with noise is Tikhonov."""
    X, y, X_val, y_val = ridge_data(n=20, d=2)
    network = nn.Linear(2, 1, bias=False).double()
    held_out = HeldOutProblem(
        network,
        X,
        y[:, None],
        X_val,
        y_val[:, None],
        weight_decay=1e-9,
        augmentation=input_noise(0.5),
        num_copies=4000,
    )
    variance = torch.tensor(0.25).double()
    train = LBFGSTraining(1e-6)
    w = train(held_out.train_loss, held_out.params, held_out.hparams)
    exact = closed.ridge_weights(X, y, variance)
    torch.testing.assert_close(w["weight"][0], exact, rtol=0.02, atol=0.01)
    found = held_out.hypergradient(w).grads["log_noise_std"]
    # The variance is exp(2 log_std).
    expected = closed.ridge_hypergradient(X, y, X_val, y_val, variance).sum()
    assert float(found) == pytest.approx(2 * 0.25 * float(expected), rel=0.05)


@pytest.mark.parametrize("augmentation", [None, input_noise(0.3)])
def test_hypergradients_of_a_nested_network_agree_with_retraining(augmentation):
    network = nested()
    with assert_module_unchanged(network):
        held_out = problem(network, augmentation=augmentation, num_copies=2)
        losses = held_out.train_loss, held_out.val_loss
        hparams = held_out.hparams
        best = minimum(losses[0], held_out.params, hparams)
        found = held_out.hypergradient(best, curvature="hessian")
    expected = difference(losses, best, hparams, "log_weight_decay", 1)
    got = found.grads["log_weight_decay"][1]
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-7)
    if augmentation is not None:
        expected = difference(losses, best, hparams, "log_noise_std")
        got = found.grads["log_noise_std"]
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-7)


def test_the_loss_is_a_mean_with_the_coupled_decay_of_fit_map():
    X, Y = rows()
    network = nested()
    held_out = problem(network)
    hparams = {"log_weight_decay": torch.tensor([-1.0, -2.0, -3.0]).double()}
    network.eval()
    named = dict(network.named_parameters())
    assert [group[0].rpartition(".")[0] for group in held_out.groups] == [
        "body.0",
        "body.1",
        "head.out",
    ]
    penalty = sum(
        0.5 * decay * sum(named[k].square().sum() for k in group)
        for decay, group in zip(
            hparams["log_weight_decay"].exp(), held_out.groups, strict=True
        )
    )
    expected = nn.functional.cross_entropy(network(X), Y) + penalty
    torch.testing.assert_close(
        held_out.train_loss(held_out.params, hparams), expected.detach()
    )
    V, W = rows(20, seed=2)
    torch.testing.assert_close(
        held_out.val_loss(held_out.params, hparams),
        nn.functional.cross_entropy(network(V), W).detach(),
    )


def test_the_loop_lowers_the_held_out_loss():
    network = nested()
    with assert_module_unchanged(network):
        held_out = problem(network, weight_decay=1e-3, augmentation=input_noise(0.1))
        loop = held_out.descent(learning_rate=0.5)
        loop.run(5, progress=False)
    assert loop.best.step.val_loss < 0.95 * loop.history[0].val_loss
    trained = held_out.network_at(loop.best.params)
    assert type(trained) is Nested and not trained.training
    X, Y = rows(20, seed=2)
    loss = nn.functional.cross_entropy(trained(X), Y)
    assert float(loss.detach()) == pytest.approx(loop.best.step.val_loss, rel=1e-9)
    decays = held_out.weight_decay(loop.best.step.hparams)
    assert set(decays) == {name for name, _ in network.named_parameters()}
    assert decays["head.out.weight"] == decays["head.out.bias"]


def test_groups_and_trained_weights_are_chosen():
    assert len(problem(groups="all").hparams["log_weight_decay"]) == 1
    assert len(problem(groups="tensor").hparams["log_weight_decay"]) == 6
    last = problem(parameters="last_layer")
    assert set(last.params) == {"head.out.weight", "head.out.bias"}


def test_the_noise_is_frozen_and_drawn_from_the_generator():
    def losses(seed):
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(0)
        held_out = problem(augmentation=input_noise(), generator=generator)
        return [held_out.train_loss(held_out.params, held_out.hparams) for _ in "ab"]

    state = torch.get_rng_state()
    problem_again = losses(0)
    assert problem_again[0] == problem_again[1] == losses(0)[0] != losses(1)[0]
    torch.set_rng_state(state)
    network = nested()
    before = torch.get_rng_state()
    problem(network, augmentation=input_noise())
    assert torch.equal(torch.get_rng_state(), before)


def test_it_is_copied_pickled_and_loaded():
    held_out = problem(augmentation=input_noise())
    value = held_out.train_loss(held_out.params, held_out.hparams)
    other = problem(augmentation=input_noise(0.7), weight_decay=1.0)
    other.load_state_dict(held_out.state_dict())
    for again in (
        copy.deepcopy(held_out),
        pickle.loads(pickle.dumps(held_out)),
        other,
    ):
        assert again.train_loss(again.params, again.hparams) == value


def test_float32_follows_the_data():
    X, Y = rows()
    held_out = HeldOutProblem(nested().float(), X.float(), Y, X.float(), Y)
    # Loose weights, at which the Hessian need not be positive.
    loop = held_out.descent(
        train=LBFGSTraining(1e-2), inner_tolerance=0.1, curvature="ggn"
    )
    loop.run(2, progress=False)
    assert loop.params["head.out.weight"].dtype == torch.float32
    assert loop.hparams["log_weight_decay"].dtype == torch.float32


def lost(X, noise, hparams):
    return X[:, :1] + hparams["a"]


X, Y = rows()
BAD = {
    "rows": ((X, Y[:3], X, Y), {}, ShapeError, "train_X has 30, train_Y has 3"),
    "held-out width": ((X, Y, X[:, :1], Y), {}, ShapeError, "val_X must have 2 col"),
    "nothing held out": ((X, Y, X[:0], Y[:0]), {}, InputDataError, "val_X has no rows"),
    "NaN": ((X / 0 * 0, Y, X, Y), {}, InputDataError, "train_X contains NaN"),
    "dtype": ((X.float(), Y, X.float(), Y), {}, TypeError, "network.to"),
    "decay": ((X, Y, X, Y), {"weight_decay": 0.0}, ValueError, "must be positive"),
    "copies": ((X, Y, X, Y), {"num_copies": 0}, ValueError, "num_copies must be a wh"),
    "shape": (
        (X, Y, X, Y),
        {"augmentation": RowAugmentation(lost, {"a": 0.0})},
        ShapeError,
        "augmentation must keep the shape",
    ),
    "name": (
        (X, Y, X, Y),
        {"augmentation": RowAugmentation(lost, {"log_weight_decay": 0.0})},
        ValueError,
        "may not name a hyperparameter log_weight_decay",
    ),
    "first value": (
        (X, Y, X, Y),
        {"augmentation": RowAugmentation(lost, {"a": float("nan")})},
        InputDataError,
        "a contains NaN",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    data, options, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        HeldOutProblem(nested(), *data, **options)
