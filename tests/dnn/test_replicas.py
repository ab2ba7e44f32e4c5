"""Copies trained at once against each of them trained alone."""

import copy
import math

import pytest
import torch
from botorch.exceptions.errors import InputDataError
from torch import nn

from gpbridge.checks import ShapeError
from gpbridge.dnn import DivergedError, train_replicas
from gpbridge.functional import FunctionalNet
from gpbridge.storage import load_state
from gpbridge.testing import assert_module_unchanged

QUICK = {"epochs": 4, "batch_size": 7, "progress": False}
EXACT = {"rtol": 1e-9, "atol": 1e-11}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def mlp(m=1):
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, m)).double()


class Nested(nn.Module):
    """A residual block with two norms, a frozen weight and a buffer."""

    def __init__(self, m=1):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.skip = nn.Linear(2, 6, bias=False)
        self.head = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, m))
        self.skip.weight.requires_grad_(False)
        self.register_buffer("shift", torch.ones(6))

    def forward(self, x):
        return self.head(self.body(x) + self.skip(x) + self.shift)


def mse(outputs, Y):
    return 0.5 * (outputs - Y).square().mean()


def stacked_mse(outputs, Y):
    return 0.5 * (outputs - Y).square().mean((-2, -1))


def gaussian_nll(outputs, Y):
    mean, log_variance = outputs[..., :1], outputs[..., 1:]
    errors = (mean - Y).square() / log_variance.exp()
    return 0.5 * (errors + log_variance).mean()


def data(*shape, seed=1):
    X = torch.randn(*shape, 2, generator=seeded(seed), dtype=torch.float64)
    return X, torch.sin(X.sum(-1, keepdim=True))


def starts(build, k=3):
    """Modules with weights of their own, and these stacked."""
    modules = []
    for r in range(k):
        torch.manual_seed(r)
        modules.append(build().double())
    net = FunctionalNet(modules[0])
    rows = [net.flatten(FunctionalNet(m).params) for m in modules]
    return modules, torch.stack(rows).detach()


def alone(module, X, Y, loss, g, make, epochs=4, batch=7, factor=lambda e: 1.0):
    """The textbook loop; takes of the generator what train_replicas takes."""
    module = copy.deepcopy(module).train()
    optimizer = make([p for p in module.parameters() if p.requires_grad])
    rate = optimizer.param_groups[0]["lr"]
    torch.randint(2**62, (), generator=g)
    losses = []
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = rate * factor(epoch)
        total = 0.0
        for rows in torch.randperm(len(X), generator=g).split(batch):
            optimizer.zero_grad()
            value = loss(module(X[rows]), Y[rows])
            value.backward()
            optimizer.step()
            total += len(rows) * value.item()
        losses.append(total / len(X))
    return module.eval(), torch.tensor(losses, dtype=torch.float64)


def adam(decay=1e-2):
    return lambda p: torch.optim.Adam(p, lr=0.03, weight_decay=decay)


def sgd(decay=1e-2):
    return lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.8, weight_decay=decay)


@pytest.mark.parametrize("build", [mlp, Nested])
@pytest.mark.parametrize("name, make", [("adam", adam()), ("sgd", sgd())])
@pytest.mark.parametrize("own", [False, True])
def test_copies_are_trained_as_each_would_be_alone(build, name, make, own):
    modules, weights = starts(build)
    X, Y = data(3, 20) if own else data(20)
    state = {
        n: torch.stack([dict(m.state_dict())[n] for m in modules])
        for n in modules[0].state_dict()
    }
    fit = train_replicas(
        modules[0], state, X, Y, mse, optimizer=name, learning_rate=0.03, momentum=0.8,
        weight_decay=1e-2, generator=[seeded(10 + r) for r in range(3)],
        schedule=lambda e: 1 / (1 + e), **QUICK,
    )  # fmt: skip
    for r, module in enumerate(modules):
        x, y = (X[r], Y[r]) if own else (X, Y)
        trained, losses = alone(
            module, x, y, mse, seeded(10 + r), make, factor=lambda e: 1 / (1 + e)
        )
        torch.testing.assert_close(fit.history["train_loss"][:, r], losses, **EXACT)
        for key, value in trained.state_dict().items():
            torch.testing.assert_close(fit.state[key][r], value, **EXACT)
    assert fit.weights.shape == weights.shape and fit.best_epoch is None
    rates = fit.history["learning_rate"][:, 0]
    torch.testing.assert_close(rates, 0.03 / torch.arange(1, 5).double())


def counted_mse(outputs, Y):
    """Of one copy alone: in a stack ``len`` counts the copies."""
    return 0.5 * (outputs - Y).square().sum((-2, -1)) / len(Y)


@pytest.mark.parametrize("loss", [mse, stacked_mse, counted_mse])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_loss_of_one_copy_and_a_stacked_one_give_the_same(loss, k):
    modules, weights = starts(mlp, k)
    fit = train_replicas(modules[0], weights, *data(20), loss, **QUICK)
    other = train_replicas(modules[0], weights, *data(20), mse, **QUICK)
    torch.testing.assert_close(fit.weights, other.weights, **EXACT)


def test_a_heteroscedastic_loss_and_decays_of_each_copy():
    build = lambda: mlp(2)  # noqa: E731
    modules, weights = starts(build)
    X, Y = data(3, 20)
    decays = torch.tensor([0.0, 0.1, 1.0])
    options = {"optimizer": "sgd", "learning_rate": 0.03, "momentum": 0.8}
    fit = train_replicas(
        modules[0], weights, X, Y, gaussian_nll, weight_decay=decays,
        generator=[seeded(r) for r in range(3)], **options, **QUICK,
    )  # fmt: skip
    for r, module in enumerate(modules):
        make = sgd(float(decays[r]))
        trained, _ = alone(module, X[r], Y[r], gaussian_nll, seeded(r), make)
        own = torch.cat([p.detach().reshape(-1) for p in trained.parameters()])
        torch.testing.assert_close(fit.weights[r], own, **EXACT)


def test_each_copy_is_returned_at_its_own_best_epoch():
    modules, weights = starts(mlp)
    X, Y = data(3, 20)
    held = data(9, seed=5)
    states = []
    fit = train_replicas(
        modules[0], weights, X, Y + 1, mse, validation=held, learning_rate=0.3,
        callback=lambda e, state, entry: states.append(
            {n: v.clone() for n, v in state.items()}
        ), **{**QUICK, "epochs": 15},
    )  # fmt: skip
    losses = fit.history["validation_loss"]
    assert torch.equal(fit.best_epoch, losses.argmin(0))
    assert len(fit.best_epoch.unique()) > 1, "nothing is shown by copies alike"
    for r, epoch in enumerate(fit.best_epoch.tolist()):
        for name, values in states[epoch].items():
            assert torch.equal(fit.state[name][r], values[r])
        net = FunctionalNet(modules[0])
        outputs = net.apply_network(net.unflatten(fit.weights[r]), held[0])
        torch.testing.assert_close(mse(outputs, held[1]), losses[epoch, r])
    last = train_replicas(
        modules[0], weights, X, Y + 1, mse, validation=held, learning_rate=0.3,
        keep_best=False, **{**QUICK, "epochs": 15},
    )  # fmt: skip
    assert last.best_epoch is None
    for name, values in states[-1].items():
        assert torch.equal(last.state[name], values)


def test_rows_of_each_copy_are_those_it_is_trained_on():
    modules, weights = starts(mlp)
    X, Y = data(20)
    rows = torch.tensor([[0, 3, 3, 9], [1, 2, 4, 8], [19, 5, 6, 7]])
    fits = [
        train_replicas(modules[0], weights, *part, mse, **QUICK, **options)
        for part, options in (
            ((X, Y), {"rows": rows}),
            ((X[rows], Y[rows]), {}),
        )
    ]
    assert torch.equal(fits[0].weights, fits[1].weights)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_run_resumed_from_its_file_is_the_same_bit_for_bit(dropout, stop, tmp_path):
    def build():
        layers = [nn.Linear(2, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)]
        return nn.Sequential(*layers, *[nn.Dropout(0.3)] * dropout).double()

    modules, weights = starts(build)
    path = tmp_path / "run"

    def run(epochs=6, **options):
        return train_replicas(
            modules[0], weights, *data(20), mse, validation=data(5, seed=9),
            generator=seeded(3), epochs=epochs, batch_size=7, progress=False, **options,
        )  # fmt: skip

    whole = run()
    run(checkpoint=path, callback=lambda epoch, *rest: epoch == stop - 1)
    assert load_state(path)["epoch"] == stop
    resumed = run(checkpoint=path)
    for name, values in whole.state.items():
        assert torch.equal(values, resumed.state[name])
    for name, values in whole.history.items():
        assert torch.equal(values, resumed.history[name])
    assert torch.equal(whole.best_epoch, resumed.best_epoch)
    again = run(checkpoint=path)  # nothing is left to do
    assert torch.equal(whole.weights, again.weights)


def test_a_file_is_written_every_few_epochs_and_of_this_run(tmp_path):
    modules, weights = starts(mlp)
    path, seen = tmp_path / "run", []

    def look(epoch, state, entry):
        seen.append(load_state(path)["epoch"] if path.exists() else 0)

    options = {"checkpoint": path, "checkpoint_every": 2, "progress": False}
    train_replicas(
        modules[0], weights, *data(20), mse, epochs=5, callback=look, **options
    )
    assert seen == [0, 0, 2, 2, 4] and load_state(path)["epoch"] == 5
    with pytest.raises(ValueError, match="another run: its batch size is 100, and now"):
        train_replicas(modules[0], weights, *data(20), mse, batch_size=5, **options)
    with pytest.raises(ValueError, match="another run: its inputs is"):
        train_replicas(modules[0], weights, *data(20, seed=2), mse, **options)
    options["checkpoint"] = tmp_path / "absent" / "run"
    with pytest.raises(FileNotFoundError, match="folder of checkpoint=.*absent"):
        train_replicas(modules[0], weights, *data(20), mse, **options)


def another_activation():
    return {"network": nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 1))}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda X: another_activation(), "network is .*1: Tanh.*now it is .*1: ReLU"),
        (lambda X: {"weight_decay": 1e-3}, "weight decay is 0.0001, and .* 0.001"),
        (lambda X: {"weight_decay": lambda e, s: 1e-4}, "its weight decay is"),
        (lambda X: {"schedule": lambda e: 0.5}, "its schedule is"),
        (lambda X: {"generator": seeded(4)}, "its seed is"),
        (lambda X: {"rows": torch.arange(20).expand(3, -1)}, "its rows is"),
        (lambda X: {"validation": data(5, seed=8)}, "its validation is"),
        (lambda X: {"X": X.flip(0)}, "its inputs is"),
        (lambda X: {"Y": X[:, :1]}, "its targets is"),
        (lambda X: {"loss": stacked_mse}, "its loss is"),
        (lambda X: {"weights": torch.zeros(3, 25).double()}, "its first weights is"),
        (lambda X: {"optimizer": "sgd"}, "its optimizer is adam, and now it is sgd"),
        (lambda X: {"epochs": 1}, "has 2 epochs already, and epochs is 1"),
    ],
)
def test_a_file_of_another_run_is_refused_by_name(change, message, tmp_path):
    modules, weights = starts(mlp)
    X, Y = data(20)
    given = {
        "network": modules[0], "weights": weights, "X": X, "Y": Y, "loss": mse,
        "validation": data(5, seed=9), "checkpoint": tmp_path / "kept",
        "epochs": 2, "progress": False,
    }  # fmt: skip
    train_replicas(**given, generator=seeded(3))
    changed = {"generator": seeded(3), **given, **change(X)}
    changed["network"] = changed["network"].double()
    with pytest.raises(ValueError, match=f"kept.*{message}"):
        train_replicas(**changed)
    longer = train_replicas(**{**given, "epochs": 3}, generator=seeded(3))
    del given["checkpoint"]
    whole = train_replicas(**{**given, "epochs": 3}, generator=seeded(3))
    assert torch.equal(longer.weights, whole.weights)


def test_dropout_differs_between_copies_and_follows_the_seed():
    network = nn.Sequential(nn.Linear(2, 40), nn.Dropout(0.5), nn.Linear(40, 1))
    for build in (network, nn.Sequential(network, nn.Flatten())):  # stacked, vmapped
        p = FunctionalNet(build).num_params
        weights = torch.ones(2, p).expand(2, -1) / 10
        X, Y = (t.float() for t in data(8))

        def run(seed, build=build, weights=weights, X=X, Y=Y):
            order = [seeded(seed), seeded(seed)]  # the same batches for both
            return train_replicas(
                build, weights, X, Y, mse, generator=order, **QUICK
            ).weights

        before = torch.get_rng_state()
        first = run(1)
        assert torch.equal(before, torch.get_rng_state())
        torch.rand(3)
        assert (first[0] - first[1]).abs().max() > 1e-3
        assert torch.equal(first, run(1)) and not torch.equal(first, run(2))


def test_a_copy_that_diverges_is_named_and_the_others_are_kept():
    modules, weights = starts(mlp)
    X, Y = data(3, 20)
    states = []

    def keep(epoch, state, entry):
        states.append({n: v.clone() for n, v in state.items()})
        if epoch == 1:
            state["0.bias"][1] = math.nan  # as an overflow would leave it

    with pytest.raises(DivergedError, match=r"epoch 2 in copies \[1\] of 3") as caught:
        train_replicas(modules[0], weights, X, Y, mse, callback=keep, **QUICK)
    fit = caught.value.last_good
    assert len(fit.history["train_loss"]) == 2
    for name, values in states[1].items():
        assert torch.equal(fit.state[name], values)
    alive = train_replicas(modules[0], weights, X, Y, mse, **{**QUICK, "epochs": 2})
    assert torch.equal(alive.weights, fit.weights)
    Y[2] = 1e200
    with pytest.raises(DivergedError, match=r"epoch 0 in copies \[2\] of 3.*inf"):
        train_replicas(modules[0], weights, X, Y, mse, **QUICK)


def test_an_interrupt_returns_the_copies_so_far_with_a_warning():
    modules, weights = starts(mlp)

    def interrupt(epoch, state, entry):
        if epoch == 1:
            raise KeyboardInterrupt

    with pytest.warns(RuntimeWarning, match="after 2 of 4 epochs"):
        fit = train_replicas(
            modules[0], weights, *data(20), mse, callback=interrupt, **QUICK
        )
    assert len(fit.history["train_loss"]) == 2
    first = lambda epoch: interrupt(1, None, None)  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        train_replicas(modules[0], weights, *data(20), mse, schedule=first, **QUICK)


def test_a_subset_of_the_weights_can_be_trained():
    modules, _ = starts(Nested)
    net = FunctionalNet(modules[0], parameters=["head"])
    start = net.flatten(net.params).detach().expand(2, -1)
    with assert_module_unchanged(modules[0]), assert_module_unchanged(net):
        fit = train_replicas(net, start, *data(20), mse, **QUICK)
    assert fit.weights.shape == (2, net.num_params)
    assert fit.state["body.1.running_mean"].shape == (2, 6)
    assert (fit.weights - start).abs().max() > 1e-3


def test_copies_do_not_depend_on_how_many_there_are():
    modules, weights = starts(Nested)
    X, Y = data(20)
    gens = lambda: [seeded(r) for r in range(3)]  # noqa: E731
    three = train_replicas(modules[0], weights, X, Y, mse, generator=gens(), **QUICK)
    one = train_replicas(
        modules[0], weights[1:2], X, Y, mse, generator=gens()[1:2], **QUICK
    )
    torch.testing.assert_close(one.weights[0], three.weights[1], **EXACT)
    default = train_replicas(modules[0], weights, X, Y, mse, **QUICK)
    seed = train_replicas(modules[0], weights, X, Y, mse, generator=seeded(), **QUICK)
    assert torch.equal(default.weights, seed.weights)


class Dependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1).double()

    def forward(self, x):
        return self.layer(x) if bool(self.layer.weight.sum() > 0) else -self.layer(x)


NETWORK = mlp()
START = torch.zeros(3, 25).double()
X, Y = data(20)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"weights": START[:, 1:]}, ShapeError, r"must be ``k x 25``.*\(3, 24\)"),
        ({"weights": {}}, ValueError, r"lacks \['0.weight', "),
        (
            {"weights": {"extra": START}},
            ValueError,
            r"has the unknown \['extra'\]",
        ),
        ({"weights": START / 0}, InputDataError, "contains NaN or Inf"),
        ({"weights": START.float()}, TypeError, "must be torch.float64"),
        ({"X": X.float()}, TypeError, "X is torch.float32, but the weights are"),
        ({"X": X[:0], "Y": Y[:0]}, ShapeError, "X must be ``n x d`` for all copies"),
        ({"X": X.expand(2, -1, -1)}, ShapeError, r"``3 x n x d`` .* \(2, 20, 2\)"),
        ({"Y": Y[:9]}, ShapeError, r"leading dimensions \(20,\) of X"),
        ({"Y": Y / 0}, InputDataError, "Y contains NaN or Inf"),
        (
            {"validation": (X[:, 0], Y)},
            ShapeError,
            "validation X must be ``... x n x d``",
        ),
        ({"rows": torch.zeros(2, 4).long()}, ShapeError, "rows must be ``3 x b`` row"),
        ({"rows": torch.full((3, 4), 20)}, ValueError, "must lie in 0 .. 19, but go"),
        ({"loss": lambda f, y: f - y}, ShapeError, r"scalar, but gave shape \(2, 1\)"),
        ({"network": Dependent(), "weights": START[:, :3]}, ValueError, "one by one"),
        ({"epochs": 0}, ValueError, "epochs must be a whole number above zero"),
        ({"batch_size": 0}, ValueError, "batch_size must be a whole number"),
        ({"optimizer": "lbfgs"}, ValueError, "optimizer must be one of 'adam', 'sgd'"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate must be positive"),
        ({"momentum": 1.0}, ValueError, r"momentum must lie in \[0, 1\), but is 1.0"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be finite and not neg"),
        (
            {"weight_decay": torch.ones(2)},
            ShapeError,
            r"one for each of the 3 copies, but has shape \(2,\)",
        ),
        (
            {"weight_decay": lambda epoch, state: math.nan},
            ValueError,
            "weight_decay in epoch 0 must be finite",
        ),
        ({"generator": [seeded()]}, ValueError, "each of the 3 copies, but are 1"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {
        "network": NETWORK, "weights": START, "X": X, "Y": Y, "loss": mse, **QUICK
    }  # fmt: skip
    with pytest.raises(error, match=message):
        train_replicas(**{**arguments, **change})


@pytest.mark.parametrize(
    "momentum, batch_size, message",
    [(0.1, 1, "batches of two rows or more"), (None, 7, "with momentum=None")],
)
def test_batch_norm_that_cannot_be_stacked_is_refused(momentum, batch_size, message):
    norm = nn.BatchNorm1d(2, momentum=momentum)
    network = nn.Sequential(norm, nn.Linear(2, 1)).double()
    weights = torch.zeros(2, 7).double()
    with pytest.raises(ValueError, match=message):
        train_replicas(network, weights, X, Y, mse, batch_size=batch_size)
