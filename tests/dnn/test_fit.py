import math
import warnings

import gpytorch
import pytest
import torch
from botorch.exceptions.errors import InputDataError
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    MultitaskGaussianLikelihood,
    SoftmaxLikelihood,
)
from sklearn.datasets import load_diabetes, load_digits
from torch import nn

from gpbridge import metrics
from gpbridge.checks import ShapeError
from gpbridge.data import holdout_rows, standardize, two_moons
from gpbridge.dnn import fit_map
from gpbridge.dnn.divergence import DivergedError
from gpbridge.likelihoods import LogisticLikelihood
from gpbridge.storage import load_state

EXACT = {"rtol": 1e-9, "atol": 1e-12}
QUICK = {"epochs": 3, "batch_size": 8, "progress": False}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def mlp(d=2, m=1, width=8, dtype=torch.float64):
    return nn.Sequential(nn.Linear(d, width), nn.Tanh(), nn.Linear(width, m)).to(dtype)


def regression(n=30, d=2, m=1, dtype=torch.float64):
    X = torch.randn(n, d, generator=generator(1), dtype=dtype)
    noise = torch.randn(n, m, generator=generator(2), dtype=dtype)
    return X, torch.sin(X.sum(-1, keepdim=True)) + 0.1 * noise


class Everything(nn.Module):
    """Batch norm, dropout, a frozen weight, a tied layer and a plain buffer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 6)
        self.norm = nn.BatchNorm1d(6)
        self.middle = nn.Linear(6, 6)
        self.dropout = nn.Dropout(0.3)
        self.last = nn.Linear(6, 1)
        self.first.weight.requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.calls += 1
        h = self.norm(self.first(x)).relu()
        h = self.dropout(self.middle(self.middle(h).tanh()))
        return self.last(h).squeeze()


def snapshot(network):
    """All that must stay bit for bit."""
    tensors = [*network.named_parameters(), *network.named_buffers()]
    return (
        {name: (t.detach().clone(), t.requires_grad, t.grad) for name, t in tensors},
        [module.training for module in network.modules()],
        [dict(module._forward_hooks) for module in network.modules()],
        {name: t.data_ptr() for name, t in tensors},
    )


def assert_unchanged(network, before):
    values, *rest = before
    values_now, *rest_now = snapshot(network)
    assert rest_now == rest
    for name, (value, requires_grad, grad) in values.items():
        value_now, requires_grad_now, grad_now = values_now[name]
        assert torch.equal(value, value_now) and requires_grad == requires_grad_now
        assert grad is grad_now


def hooked_network():
    network = Everything().double()
    network.norm.eval()  # modes that differ between submodules
    network.last.weight.grad = torch.ones_like(network.last.weight)
    seen = []
    network.first.register_forward_hook(lambda *args: seen.append(args))
    return network, seen


def test_the_callers_module_is_bit_for_bit_unchanged():
    network, seen = hooked_network()
    before = snapshot(network)
    fit = fit_map(network, *regression(), **QUICK)
    assert_unchanged(network, before)
    assert not seen, "the caller's hooks ran"
    assert fit.network is not network and not fit.network.training
    assert fit.network.last.weight.grad is None
    assert not torch.equal(fit.network.last.weight, network.last.weight)
    assert torch.equal(fit.network.first.weight, network.first.weight)  # frozen


def test_a_failure_inside_leaves_module_and_random_state_unchanged():
    network, _ = hooked_network()
    before, state = snapshot(network), torch.get_rng_state()

    def fail(epoch, network, entry):
        if epoch == 1:
            raise ZeroDivisionError("inside")

    with pytest.raises(ZeroDivisionError, match="inside"):
        fit_map(network, *regression(), callback=fail, **QUICK)
    assert_unchanged(network, before)
    assert torch.equal(state, torch.get_rng_state())


def test_the_global_random_state_is_neither_read_nor_written():
    network, X, Y = Everything().double(), *regression()
    state = torch.get_rng_state()
    first = fit_map(network, X, Y, **QUICK)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(7)
    second = fit_map(network, X, Y, **QUICK)
    assert first.history == second.history


def test_a_seed_determines_the_result():
    network, X, Y = Everything().double(), *regression()

    def run(seed):
        return fit_map(network, X, Y, generator=generator(seed), **QUICK)

    one, same, other = run(3), run(3), run(4)
    assert one.history == same.history != other.history
    assert torch.equal(one.validation_rows, same.validation_rows)
    for a, b in zip(one.network.parameters(), same.network.parameters(), strict=True):
        assert torch.equal(a, b)
    default = fit_map(network, X, Y, **QUICK)
    assert default.history == run(0).history


def test_fit_and_validation_rows_are_disjoint_and_complete():
    fit = fit_map(mlp(), *regression(41), **QUICK)
    assert len(fit.validation_rows) == 4
    rows = torch.cat([fit.fit_rows, fit.validation_rows])
    assert torch.equal(rows.sort().values, torch.arange(41))
    expected = holdout_rows(41, 0.1, generator(0))[1]
    assert torch.equal(fit.validation_rows, expected)


def test_given_validation_rows_are_held_out():
    X, Y = regression()
    rows = torch.tensor([7, 2, 29])
    fit = fit_map(mlp(), X, Y, validation_rows=rows, **QUICK)
    assert fit.validation_rows.tolist() == [2, 7, 29]
    assert len(fit.fit_rows) == 27 and not torch.isin(fit.fit_rows, rows).any()


@pytest.mark.parametrize("kind", ["gaussian", "softmax"])
def test_the_returned_network_is_the_best_epochs(kind):
    X, Y = regression(60)
    loss, m = nn.functional.mse_loss, 1
    if kind == "softmax":
        Y, loss, m = (X[:, 0] * X[:, 1] > 0).long(), nn.functional.cross_entropy, 2
    states = []

    def keep(epoch, network, entry):
        states.append([p.detach().clone() for p in network.parameters()])

    fit = fit_map(
        mlp(m=m),
        X,
        Y,
        epochs=40,
        learning_rate=0.1,
        batch_size=10,
        progress=False,
        callback=keep,
    )
    recorded = torch.tensor(fit.history["validation_loss"], dtype=torch.float64)
    best = int(recorded.argmin())
    assert 0 < best < 39, "the case must have its optimum inside"
    outputs = fit.network(X[fit.validation_rows])
    got = loss(outputs, Y[fit.validation_rows])
    got = got / 2 if kind == "gaussian" else got
    torch.testing.assert_close(got.detach(), recorded[best], **EXACT)
    for p, kept in zip(fit.network.parameters(), states[best], strict=True):
        assert torch.equal(p, kept)


def test_without_early_stopping_all_rows_train_and_the_last_epoch_counts():
    states = []

    def keep(epoch, network, entry):
        states.append(network[0].weight.detach().clone())

    X, Y = regression()
    for options in ({"early_stopping": False}, {"validation_fraction": 0}):
        fit = fit_map(mlp(), X, Y, callback=keep, **options, **QUICK)
        assert fit.fit_rows.tolist() == list(range(30))
        assert len(fit.validation_rows) == 0 and fit.validation_variance is None
        assert "validation_loss" not in fit.history
        assert torch.equal(fit.network[0].weight, states[-1])
    rows = torch.tensor([0, 1])
    fit = fit_map(
        mlp(), X, Y, early_stopping=False, validation_rows=rows, callback=keep, **QUICK
    )
    assert len(fit.history["validation_loss"]) == 3 and len(fit.fit_rows) == 28
    assert torch.equal(fit.network[0].weight, states[-1])


def test_full_batches_follow_torchs_adam_on_the_stated_loss():
    X, Y = regression(m=2)
    network = mlp(m=2)
    expected = mlp(m=2)
    expected.load_state_dict(network.state_dict())
    weights = list(expected.parameters())
    optimizer = torch.optim.Adam(weights, lr=0.02)
    for epoch in range(5):
        rate = 0.02 * 0.5 * (1 + math.cos(math.pi * epoch / 5))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = 0.5 * (expected(X) - Y).square().sum(-1).mean()
        loss = loss + 0.5 * 0.3 * sum(p.square().sum() for p in weights)
        loss.backward()
        optimizer.step()
    fit = fit_map(
        network,
        X,
        Y,
        epochs=5,
        learning_rate=0.02,
        batch_size=100,
        weight_decay=0.3,
        early_stopping=False,
        schedule="cosine",
        progress=False,
    )
    for p, q in zip(fit.network.parameters(), weights, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


def test_the_decay_is_the_ridge_of_the_matching_prior():
    # lambda = v / (s n): ridge regression with penalty v / s, solved in closed form.
    X, Y = regression(25, d=3)
    network = nn.Linear(3, 1, bias=False).double()
    prior_variance, noise_variance = 0.4, 2.0
    fit = fit_map(
        network,
        X,
        Y,
        epochs=800,
        learning_rate=0.05,
        weight_decay=noise_variance / (prior_variance * 25),
        early_stopping=False,
        schedule="cosine",
        progress=False,
    )
    gram = X.T @ X + noise_variance / prior_variance * torch.eye(3).double()
    expected = torch.linalg.solve(gram, X.T @ Y).T
    torch.testing.assert_close(fit.network.weight, expected, rtol=1e-6, atol=1e-8)


def test_fixed_noise_weights_the_points_by_their_precision():
    X, Y = regression(25, d=3)
    noise = torch.linspace(0.1, 3.0, 25, dtype=torch.float64)
    fit = fit_map(
        nn.Linear(3, 1, bias=False).double(),
        X,
        Y,
        FixedNoiseGaussianLikelihood(noise),
        epochs=800,
        learning_rate=0.05,
        weight_decay=0,
        early_stopping=False,
        schedule="cosine",
        progress=False,
    )
    W = X / noise[:, None]
    expected = torch.linalg.solve(X.T @ W, W.T @ Y).T
    torch.testing.assert_close(fit.network.weight, expected, rtol=1e-6, atol=1e-8)


def test_weight_decay_may_be_a_function_of_the_epoch_and_the_network():
    X, Y = regression()
    calls = []

    def decay(epoch, network, fit_X, fit_Y):
        calls.append((epoch, network, network.training, fit_X, fit_Y))
        return torch.tensor(0.5 ** (epoch + 1))

    network = mlp()
    fit = fit_map(network, X, Y, weight_decay=decay, **QUICK)
    assert fit.history["weight_decay"] == [0.5, 0.25, 0.125]
    assert fit.weight_decay == 0.125
    assert [call[0] for call in calls] == [0, 1, 2]
    for _, seen, training, fit_X, fit_Y in calls:
        assert seen is fit.network and not training
        assert torch.equal(fit_X, X[fit.fit_rows])
        assert torch.equal(fit_Y, Y[fit.fit_rows])
    constant = fit_map(network, X, Y, weight_decay=lambda *args: 0.2, **QUICK)
    same = fit_map(network, X, Y, weight_decay=0.2, **QUICK)
    assert constant.history == same.history


@pytest.mark.parametrize("m", [1, 3])
def test_variances_are_mean_squared_residuals_per_output(m):
    X, Y = regression(m=m)
    fit = fit_map(mlp(m=m), X, Y, **QUICK)
    residuals = (fit.network(X) - Y).detach().square()
    for variance, rows in (
        (fit.residual_variance, fit.fit_rows),
        (fit.validation_variance, fit.validation_rows),
    ):
        torch.testing.assert_close(variance, residuals[rows].mean(0), **EXACT)


@pytest.mark.parametrize(
    "likelihood, labels, loss",
    [
        (None, "n", nn.functional.binary_cross_entropy_with_logits),
        (None, "n x 1 float", nn.functional.binary_cross_entropy_with_logits),
        (LogisticLikelihood(), "bool", nn.functional.binary_cross_entropy_with_logits),
        (
            BernoulliLikelihood(),
            "n x 1 float",
            lambda f, y: (
                -(
                    y * torch.special.ndtr(f).log()
                    + (1 - y) * torch.special.ndtr(-f).log()
                ).mean()
            ),
        ),
    ],
)
def test_binary_labels_are_fitted_by_their_link(likelihood, labels, loss):
    X, _ = regression()
    y = X[:, 0] > 0.2
    Y = {"n": y.long(), "n x 1 float": y.double()[:, None], "bool": y}[labels]
    fit = fit_map(mlp(), X, Y, likelihood, **QUICK)
    rows = fit.validation_rows
    expected = loss(fit.network(X[rows]), y[rows].double()[:, None])
    best = min(fit.history["validation_loss"])
    torch.testing.assert_close(expected.item(), best, **EXACT)
    assert fit.residual_variance is None and fit.validation_variance is None


def test_likelihoods_of_one_kind_share_their_loss():
    X, Y = regression(m=2)
    likelihood = MultitaskGaussianLikelihood(num_tasks=2, rank=0)
    network = mlp(m=2)
    given = fit_map(network, X, Y, likelihood, **QUICK)
    assert given.history == fit_map(network, X, Y, **QUICK).history
    labels = (X[:, 0] > 0).long()
    softmax = SoftmaxLikelihood(num_classes=2, mixing_weights=False)
    given = fit_map(network, X, labels, softmax, **QUICK)
    assert given.history == fit_map(network, X, labels, **QUICK).history


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_networks_may_return_vectors_and_squeeze_single_rows(dtype):
    # 27 fit rows in batches of 13 leave a batch of one row.
    X, Y = regression(30, dtype=dtype)
    network = nn.Sequential(mlp(dtype=dtype), nn.Flatten(0))
    flat = fit_map(network, X, Y, epochs=2, batch_size=13, progress=False)
    plain = fit_map(network[0], X, Y, epochs=2, batch_size=13, progress=False)
    assert flat.history == plain.history
    assert flat.residual_variance.dtype == dtype
    everything = Everything().to(dtype)  # squeezes, and batch norm skips one row
    fit = fit_map(everything, X, Y, epochs=2, batch_size=13, progress=False)
    # The probe, two epochs of two steps and a validation, two residual variances.
    assert fit.network.calls == 1 + 2 * (2 + 1) + 2


def test_input_shape_unflattens_the_columns():
    X = torch.randn(20, 32, generator=generator())
    labels = torch.arange(20) % 3
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 3))
    flat = fit_map(network, X, labels, input_shape=(2, 4, 4), **QUICK)
    shaped = fit_map(network, X.reshape(20, 2, 4, 4), labels, **QUICK)
    assert flat.history == shaped.history


def test_hooks_that_compute_a_weight_stay():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the old form, on purpose
        layer = nn.utils.spectral_norm(nn.Linear(2, 4).double())
    network = nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 1).double())
    fit = fit_map(network, *regression(), **QUICK)
    assert torch.linalg.matrix_norm(fit.network[0].weight, 2) < 1.1


def test_training_works_under_no_grad():
    with torch.no_grad():
        fit = fit_map(mlp(), *regression(), **QUICK)
    assert fit.history["train_loss"][-1] < fit.history["train_loss"][0]


def test_one_row_can_be_fitted():
    X, Y = regression(1)
    fit = fit_map(mlp(), X, Y, validation_fraction=0, epochs=200, progress=False)
    assert fit.residual_variance < 1e-2


def test_a_callback_sees_each_epoch_and_may_stop():
    entries = []

    def stop(epoch, network, entry):
        entries.append((epoch, network.training, entry))
        return epoch == 1

    fit = fit_map(mlp(), *regression(), callback=stop, **QUICK)
    assert [epoch for epoch, *_ in entries] == [0, 1]
    assert not any(training for _, training, _ in entries)
    for key, values in fit.history.items():
        assert values == [entry[key] for *_, entry in entries]


@pytest.mark.parametrize("early_stopping, which", [(True, "best"), (False, "last")])
def test_an_interrupt_returns_the_weights_so_far_with_a_warning(early_stopping, which):
    def interrupt(epoch, network, entry):
        if epoch == 1:
            raise KeyboardInterrupt

    with pytest.warns(RuntimeWarning, match=f"after 2 of 3 epochs; the {which}") as box:
        fit = fit_map(
            mlp(),
            *regression(),
            callback=interrupt,
            early_stopping=early_stopping,
            **QUICK,
        )
    assert box[0].filename == __file__, "the warning points at the caller"
    assert len(fit.history["train_loss"]) == 2 and not fit.network.training


def test_an_interrupt_before_the_first_epoch_ends_is_passed_on():
    def interrupt(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_map(mlp(), *regression(), weight_decay=interrupt, **QUICK)


def test_no_bar_is_shown_without_a_terminal(capfd):
    fit_map(mlp(), *regression(), epochs=2)
    assert capfd.readouterr() == ("", "")


def test_diabetes_is_learnt_to_a_sane_error():
    X, y = load_diabetes(return_X_y=True)
    X, _ = standardize(torch.from_numpy(X))
    Y, _ = standardize(torch.from_numpy(y)[:, None])
    train, test = holdout_rows(len(X), 0.25, generator(1))
    fit = fit_map(mlp(10, width=50), X[train], Y[train], epochs=60, progress=False)
    mean = fit.network(X[test]).detach()
    assert metrics.rmse(mean, Y[test]) < 0.8
    noise = fit.validation_variance.expand_as(mean)
    assert metrics.gaussian_nll(mean, noise, Y[test]) < 1.25


def test_digits_are_learnt_to_a_sane_accuracy():
    X, y = load_digits(return_X_y=True)
    X, y = torch.from_numpy(X).float() / 16, torch.from_numpy(y)
    train, test = holdout_rows(len(X), 0.3, generator(1))
    network = mlp(64, 10, width=30, dtype=torch.float32)
    fit = fit_map(network, X[train], y[train], epochs=20, progress=False)
    probabilities = fit.network(X[test]).detach().softmax(-1)
    assert metrics.accuracy(probabilities, y[test]) > 0.94


def test_moons_are_learnt_by_one_logit():
    X, labels = two_moons(120, generator())
    fit = fit_map(
        mlp(width=20), X, labels, epochs=200, learning_rate=0.03, progress=False
    )
    assert ((fit.network(X)[:, 0] > 0) == labels.bool()).double().mean() > 0.93


class Broken(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.layer = nn.Linear(2, 1).double()
        self.output = output

    def forward(self, x):
        return self.output(self.layer(x))


X, Y = regression()
INTEGERS = torch.arange(30) % 2
UNKNOWN = gpytorch.likelihoods.BetaLikelihood()


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((len, X, Y), TypeError, "network must be a torch.nn.Module, but is builtin"),
        ((mlp(), [[1.0]], Y), TypeError, "train_X must be a torch.Tensor"),
        ((mlp(), X, [1.0]), TypeError, "train_Y must be a torch.Tensor"),
        ((mlp(), X[:, 0], Y), ShapeError, "train_X must be ``... x n x d``"),
        ((mlp(), X * math.nan, Y), InputDataError, "train_X contains NaN"),
        ((mlp(), X, Y / 0), InputDataError, "train_Y contains NaN or Inf in 30"),
        ((mlp(), X[:0], Y[:0]), InputDataError, "train_X has no rows"),
        ((mlp(), X, Y[:9]), ShapeError, "train_X has 30, train_Y has 9"),
        ((mlp(), X, Y.to("meta")), ValueError, "train_Y is on meta"),
        ((mlp(), X.float(), Y.float()), TypeError, "are torch.float64, but train_X is"),
        ((mlp(), X, Y.float()), TypeError, "train_Y must be torch.float64"),
        ((mlp(), X, Y[:, 0]), ShapeError, r"train_Y.unsqueeze\(-1\)"),
        ((mlp(m=2), X, Y), ShapeError, "has shape|network has 2"),
        ((mlp(), X, Y.long(), GaussianLikelihood()), TypeError, r"train_Y.double\(\)"),
        ((mlp(m=2), X, INTEGERS + 1), InputDataError, "must lie in 0 .. 1"),
        ((mlp(), X, Y, LogisticLikelihood()), InputDataError, "must hold 0 and 1"),
        ((mlp(), X, Y, UNKNOWN), NotImplementedError, "no rule for BetaLikelihood"),
        ((mlp(d=3), X, Y), ShapeError, "fails on an X of 2 columns: .*3x8.* takes"),
        ((Broken(lambda f: (f, f)), X, Y), TypeError, "returns tuple. Wrap it"),
        (
            (Broken(lambda f: f[None]), X, Y),
            ShapeError,
            r"2 rows of \(2,\) gave \(1, 2, 1\)",
        ),
        ((mlp().requires_grad_(False), X, Y), ValueError, "has nothing to train"),
        ((nn.LazyLinear(1), X, Y), ValueError, "lazy layers .*Call network"),
        (
            (mlp(m=2), X, INTEGERS, SoftmaxLikelihood(num_classes=2, num_features=2)),
            ValueError,
            "mixing_weights=False",
        ),
    ],
)
def test_bad_arguments_are_refused_with_their_reason(arguments, error, message):
    with pytest.raises(error, match=message):
        fit_map(*arguments, **QUICK)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"epochs": 0}, ValueError, "epochs must be at least 1, but is 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate must be positive"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be finite and not"),
        (
            {"weight_decay": lambda *args: math.nan},
            ValueError,
            "weight_decay in epoch 0",
        ),
        (
            {"schedule": "linear"},
            ValueError,
            "schedule must be one of 'constant', 'cos",
        ),
        ({"validation_fraction": 1.0}, ValueError, "validation_fraction must lie in"),
        ({"validation_rows": [1]}, TypeError, "validation_rows must be a torch.Tensor"),
        (
            {"validation_rows": torch.zeros(30, dtype=torch.bool)},
            TypeError,
            r"is \(30,\) of torch.bool. For a mask try torch.nonzero",
        ),
        (
            {"validation_rows": torch.tensor([1, 1])},
            ValueError,
            "are 2 numbers, 1 of them different, between 1 and 1",
        ),
        (
            {"validation_rows": torch.tensor([30])},
            ValueError,
            r"different row numbers in 0 .. 29.* between 30 and 30",
        ),
        ({"input_shape": (1, 3)}, ShapeError, r"\(1, 3\) has 3 numbers per row, but"),
    ],
)
def test_bad_options_are_refused_with_their_reason(options, error, message):
    with pytest.raises(error, match=message):
        fit_map(mlp(), X, Y, **{**QUICK, **options})


def test_one_row_cannot_be_held_out():
    with pytest.raises(ValueError, match="one row.*validation_fraction=0"):
        fit_map(mlp(), X[:1], Y[:1], **QUICK)


def test_batch_normalisation_refuses_batches_of_one_row():
    with pytest.raises(
        ValueError, match="two rows or more, but batch_size is 1 and 27"
    ):
        fit_map(Everything().double(), X, Y, epochs=1, batch_size=1, progress=False)


def test_divergence_is_an_error_that_says_when():
    with pytest.raises(DivergedError, match="diverged in epoch 0.*or try learning_ra"):
        fit_map(mlp(), X, 1e200 * Y, **QUICK)


@pytest.mark.parametrize("early_stopping", [False, True])
def test_a_run_that_diverges_keeps_the_network_before(early_stopping):
    options = {**QUICK, "early_stopping": early_stopping}

    def poison(epoch, network, entry):
        if epoch == 1:
            next(network.parameters()).data[0] = torch.nan

    network = mlp()
    epochs = 2 if early_stopping else 1
    before = fit_map(network, X, Y, **{**options, "epochs": epochs}).network
    with pytest.raises(DivergedError, match=r"epoch 2.*\.last_good") as caught:
        fit_map(network, X, Y, callback=poison, **{**options, "epochs": 4})
    kept = caught.value.last_good
    for one, other in zip(kept.parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_network_that_keeps_graph_tensors_cannot_be_copied():
    network = mlp()
    network.cache = network(X)
    with pytest.raises(ValueError, match="cannot be copied: .* Detach them"):
        fit_map(network, X, Y, **QUICK)


class Fails(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.layer, self.error = nn.Linear(2, 1).double(), error

    def forward(self, x):
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("out of memory"),
        NotImplementedError("no forward"),
        KeyError("key"),
    ],
)
def test_an_error_of_the_network_keeps_its_own_name(error):
    with pytest.raises(type(error)):
        fit_map(Fails(error), *regression(), **QUICK)


@pytest.mark.parametrize("stop", [1, 2, 5])
@pytest.mark.parametrize("early_stopping", [True, False])
def test_a_run_resumed_from_its_file_is_the_same_bit_for_bit(
    early_stopping, stop, tmp_path
):
    torch.manual_seed(0)
    network, (X, Y) = Everything().double(), regression()
    options = {
        "epochs": 6, "batch_size": 8, "progress": False, "schedule": "cosine",
        "early_stopping": early_stopping, "validation_fraction": 0.2,
        "learning_rate": 0.05, "weight_decay": lambda epoch, *rest: 1e-3 * epoch,
    }  # fmt: skip
    path, state = tmp_path / "run", torch.get_rng_state()
    whole = fit_map(network, X, Y, generator=generator(3), **options)

    def resume(**more):
        return fit_map(
            network, X, Y, generator=generator(3), checkpoint=path, **options, **more
        )

    before = snapshot(network)
    resume(callback=lambda epoch, *rest: epoch == stop - 1)
    assert load_state(path)["epoch"] == stop
    for _ in range(2):  # and when nothing is left to do
        resumed = resume()
        assert resumed.history == whole.history
        found = snapshot(resumed.network)[0]
        for name, (value, *_) in snapshot(whole.network)[0].items():
            assert name == "calls" or torch.equal(value, found[name][0])
    assert torch.equal(torch.get_rng_state(), state)
    assert_unchanged(network, before)


def test_a_file_may_have_more_epochs_to_go_and_is_written_every_few(tmp_path):
    network, (X, Y) = mlp(), regression()
    path, seen = tmp_path / "run", []

    def look(epoch, network, entry):
        seen.append(load_state(path)["epoch"] if path.exists() else 0)

    file = {"checkpoint": path, "checkpoint_every": 2}
    fit_map(network, X, Y, **QUICK | {"epochs": 5}, callback=look, **file)
    assert seen == [0, 0, 2, 2, 4] and load_state(path)["epoch"] == 5
    longer = fit_map(network, X, Y, **QUICK | {"epochs": 8}, **file)
    whole = fit_map(network, X, Y, **QUICK | {"epochs": 8})
    assert longer.history == whole.history


def test_a_resumed_run_that_diverges_keeps_what_it_would_have_kept(tmp_path):
    """Also the weights of an epoch before the file was written."""
    network, (X, Y) = mlp(), regression()
    options = {**QUICK, "early_stopping": False, "epochs": 4}

    def decay(epoch, network, *rest):
        if epoch == 2:
            next(network.parameters()).data[0] = torch.nan
        return 0.0

    found = []
    for file in (None, tmp_path / "run"):
        if file is not None:
            fit_map(
                network, X, Y, weight_decay=decay, checkpoint=file, **options,
                callback=lambda epoch, *rest: epoch == 1,
            )  # fmt: skip
        with pytest.raises(DivergedError) as caught:
            fit_map(network, X, Y, weight_decay=decay, checkpoint=file, **options)
        found.append(caught.value.last_good.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


class StatefulDecay:
    def __call__(self, epoch, network, X, Y):
        return 0.0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"network": nn.Linear(2, 1).double()}, "its network is"),
        ({"train_X": regression()[0].flip(0)}, "its inputs is"),
        ({"train_Y": regression()[1].flip(0)}, "its targets is"),
        ({"learning_rate": 0.1}, "its learning rate is 0.005, and now it is 0.1"),
        ({"weight_decay": lambda *rest: 0.0}, "its weight decay is"),
        ({"schedule": "cosine"}, "its schedule is"),
        ({"early_stopping": False}, "its validation rows|its keeping of the best"),
        ({"generator": generator(4)}, "its seed is"),
        ({"validation_rows": torch.arange(3)}, "its seed|its validation rows is"),
        ({"epochs": 2}, "has 3 epochs already, and epochs is 2"),
    ],
)
def test_a_file_of_another_run_is_refused_by_name(change, message, tmp_path):
    torch.manual_seed(0)
    X, Y = regression()
    given = {"network": mlp(), "train_X": X, "train_Y": Y, **QUICK}
    given["checkpoint"] = tmp_path / "kept"
    fit_map(**given)
    with pytest.raises(ValueError, match=f"kept.*({message})"):
        fit_map(**given | change)


def test_files_that_cannot_be_are_refused_at_the_door(tmp_path):
    X, Y = regression()
    with pytest.raises(FileNotFoundError, match="folder of checkpoint=.*absent"):
        fit_map(mlp(), X, Y, checkpoint=tmp_path / "absent" / "run", **QUICK)
    with pytest.raises(ValueError, match="checkpoint_every must be a whole number"):
        fit_map(mlp(), X, Y, checkpoint=tmp_path / "run", checkpoint_every=0, **QUICK)
    decay = StatefulDecay()
    with pytest.raises(TypeError, match="plain function.* but is a StatefulDecay"):
        fit_map(mlp(), X, Y, checkpoint=tmp_path / "run", weight_decay=decay, **QUICK)
