"""Copies trained at once against each of them trained alone."""

import copy

import pytest
import torch
from torch import nn

from gpbridge.dnn import train_replicas
from gpbridge.functional import FunctionalNet

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


@pytest.mark.parametrize("loss", [mse, stacked_mse])
def test_a_loss_of_one_copy_and_a_stacked_one_give_the_same(loss):
    modules, weights = starts(mlp)
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
