"""Members trained in one run against runs of fit_map."""

import pytest
import torch
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
from torch import nn

from gpbridge.dnn import fit_ensemble, fit_map
from gpbridge.testing import assert_module_unchanged

QUICK = {"epochs": 5, "batch_size": 8, "progress": False}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def mlp(m=1):
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, m)).double()


class Nested(nn.Module):
    def __init__(self, m=1):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.skip = nn.Linear(2, 6, bias=False)
        self.head = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, m))
        self.skip.weight.requires_grad_(False)

    def forward(self, x):
        return self.head(self.body(x) + self.skip(x))


def data(n=30, m=1):
    X = torch.randn(n, 2, generator=seeded(1), dtype=torch.float64)
    return X, torch.sin(X.sum(-1, keepdim=True) * torch.arange(1.0, m + 1))


def labels(X, kind):
    if kind == "softmax":
        return (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
    return (X[:, 0] > 0).double()[:, None]


CASES = {
    "gaussian": (lambda: mlp(), lambda X, Y: (Y, None)),
    "nested": (lambda: Nested().double(), lambda X, Y: (Y, None)),
    "outputs": (lambda: mlp(2), lambda X, Y: (Y.repeat(1, 2), None)),
    "softmax": (lambda: mlp(3), lambda X, Y: (labels(X, "softmax"), None)),
    "logistic": (lambda: mlp(), lambda X, Y: (labels(X, "logistic"), None)),
    "noise": (
        lambda: mlp(),
        lambda X, Y: (Y, FixedNoiseGaussianLikelihood(X[:, 0].square() + 0.1)),
    ),
}


@pytest.mark.parametrize("early_stopping", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_a_member_is_what_fit_map_gives(case, early_stopping):
    build, target = CASES[case]
    X, Y = data()
    Y, likelihood = target(X, Y)
    initial = [build() for _ in range(3)]
    options = {
        "weight_decay": 1e-2, "schedule": "cosine", "early_stopping": early_stopping,
        "validation_rows": torch.tensor([3, 7, 20]), "learning_rate": 0.05, **QUICK,
    }  # fmt: skip
    fit = fit_ensemble(
        build(), X, Y, 3, likelihood, initial=initial, generator=seeded(4), **options
    )
    for r, module in enumerate(initial):
        single = fit_map(
            module, X, Y, likelihood, generator=seeded(fit.seeds[r]), **options
        )
        member = fit.member(r)
        for name, values in single.history.items():
            torch.testing.assert_close(member.history[name], values)
        state = single.network.state_dict()
        for name, value in member.network.state_dict().items():
            torch.testing.assert_close(value, state[name])
        for name in ("fit_rows", "validation_rows", "residual_variance"):
            found, wanted = getattr(member, name), getattr(single, name)
            assert (found is None) == (wanted is None)
            if found is not None:
                torch.testing.assert_close(found, wanted)


def test_members_start_anew_and_from_the_seed_alone():
    network, (X, Y) = Nested().double(), data()
    fits = [
        fit_ensemble(network, X, Y, 3, learning_rate=1e-12, generator=g, **QUICK)
        for g in (seeded(1), seeded(1), seeded(2), None)
    ]
    assert torch.equal(fits[0].weights, fits[1].weights)
    assert not torch.equal(fits[0].weights, fits[2].weights)
    first = fits[0].networks
    assert first[0].body[0].weight.std() > 0.1
    assert (first[0].body[0].weight - first[1].body[0].weight).abs().max() > 0.1
    assert torch.equal(first[1].skip.weight, network.skip.weight)  # frozen
    torch.testing.assert_close(first[1].head[0].weight, torch.ones(6).double())


def test_nothing_of_the_callers_is_changed():
    network, (X, Y) = Nested().double(), data()
    state = torch.get_rng_state()
    with assert_module_unchanged(network):
        fit_ensemble(network, X, Y, 2, **QUICK)
    assert torch.equal(state, torch.get_rng_state())


def test_validation_rows_are_held_out_of_all_and_bootstraps_repeat_the_others():
    X, Y = data()
    fit = fit_ensemble(mlp(), X, Y, 4, bootstrap=True, **QUICK)
    assert fit.member_rows.shape == (4, 27) and len(fit.validation_rows) == 3
    assert not torch.isin(fit.member_rows, fit.validation_rows).any()
    assert all(len(rows.unique()) < 25 for rows in fit.member_rows)
    assert not torch.equal(fit.member_rows[0], fit.member_rows[1])
    assert repr(fit).startswith("EnsembleFit(4 x Sequential, 27 fit rows, 3 validat")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"generator": seeded(9)}, "its inputs is|its rows is"),
        ({"bootstrap": True}, "its rows is"),
        ({"schedule": "cosine"}, "its schedule is"),
    ],
)
def test_a_file_of_another_ensemble_is_refused(change, message, tmp_path):
    X, Y = data()
    options = {**QUICK, "checkpoint": tmp_path / "kept"}
    first = fit_ensemble(mlp(), X, Y, 2, **options)
    again = fit_ensemble(mlp(), X, Y, 2, **options)
    assert torch.equal(first.weights, again.weights)
    with pytest.raises(ValueError, match=f"kept.*of another run: .*({message})"):
        fit_ensemble(mlp(), X, Y, 2, **{**options, **change})


def test_images_and_flat_rows_are_the_same():
    X = torch.randn(20, 1, 4, 4, generator=seeded())
    Y = X.mean((1, 2, 3))[:, None]
    network = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1)
    )
    a = fit_ensemble(network, X, Y, 2, **QUICK)
    b = fit_ensemble(network, X.flatten(1), Y, 2, input_shape=(1, 4, 4), **QUICK)
    assert torch.equal(a.weights, b.weights)


def test_a_decay_may_depend_on_the_member():
    X, Y = data()
    seen = []

    def decay(epoch, network, fit_X, fit_Y):
        seen.append((epoch, len(fit_X), network[0].weight.detach().clone()))
        return 0.1 * len(seen)

    fit = fit_ensemble(mlp(), X, Y, 2, weight_decay=decay, **QUICK)
    assert [epoch for epoch, *_ in seen] == [e for e in range(5) for _ in range(2)]
    assert not torch.equal(seen[0][2], seen[1][2]) and seen[0][1] == 27
    expected = 0.1 * torch.arange(1, 11).double().reshape(5, 2)
    torch.testing.assert_close(fit.history["weight_decay"], expected)
    with pytest.raises(ValueError, match="weight_decay of member 0 in epoch 0"):
        fit_ensemble(mlp(), X, Y, 2, weight_decay=lambda *a: -1.0, **QUICK)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2).double())

    def forward(self, x):
        return (x * self.scale).sum(-1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_members": 0}, "num_members must be a whole number above zero"),
        ({"initial": [mlp()]}, "one module for each of the 2 members, but has 1"),
        ({"initial": [mlp(), mlp(2)]}, r"one architecture.*of \[1\] have other"),
        ({"network": Scale()}, r"network \(Scale\) has weights and no reset_param"),
        ({"validation_fraction": 1.0}, r"validation_fraction must lie in \[0, 1\)"),
        ({"schedule": "linear"}, "schedule must be one of"),
    ],
)
def test_bad_input(arguments, message):
    X, Y = data()
    arguments = {"network": mlp(), "num_members": 2, **QUICK, **arguments}
    with pytest.raises(ValueError, match=message):
        fit_ensemble(arguments.pop("network"), X, Y, **arguments)
