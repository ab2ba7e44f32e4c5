"""Training that learns its own prior and noise: optimum, state, doors."""

import copy
import itertools
import math

import pytest
import torch
from botorch.exceptions.errors import InputDataError
from gpytorch.constraints import GreaterThan, Interval
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    LaplaceLikelihood,
    MultitaskGaussianLikelihood,
)
from torch import nn
from torch.func import functional_call, jacrev
from torch.utils.data import DataLoader, TensorDataset

from gpbridge import LinearizedGP
from gpbridge.checks import ReliabilityWarning, ShapeError
from gpbridge.dnn import DivergedError
from gpbridge.kernels.tangent import weight_groups
from gpbridge.linearized import Diagonal, Exact, Kronecker, LowRank
from gpbridge.selection import (
    OnlineFit,
    fit_evidence,
    fit_online,
    online_training,
    training_batches,
)
from gpbridge.selection.online_evidence import check_learnable, measure_evidence
from gpbridge.selection.training_batches import TrainingBatches
from gpbridge.testing import assert_module_unchanged
from tests import oracles_selection as oracles
from tests.oracles_curvature import kronecker_of_two_layers, softmax_hessians

D = 3


class Nested(nn.Module):
    """Layers inside of modules, batch norm, dropout, and an output of shape n."""

    def __init__(self, m=1):
        super().__init__()
        self.body = nn.ModuleDict(
            {"first": nn.Linear(D, 8), "norm": nn.BatchNorm1d(8), "drop": nn.Dropout()}
        )
        self.head = nn.Linear(8, m)

    def forward(self, x):
        hidden = self.body["drop"](self.body["norm"](self.body["first"](x)).tanh())
        return self.head(hidden).squeeze(-1)


def tanh_net(m=1):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)  # the same at each call
        return nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, m)).double()


def points(n, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, D, generator=generator, dtype=torch.float64).to(dtype)


def labels(kind, X, m):
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(len(X), m, generator=generator, dtype=torch.float64)
    values = torch.sin(2 * X.sum(-1, keepdim=True) + torch.arange(m)) + 0.2 * noise
    if kind == "softmax":
        return values.argmax(-1)
    return (values > 0).double() if kind == "logistic" else values


def loader(X, Y, size, **options):
    return DataLoader(TensorDataset(X, Y), batch_size=size, **options)


def run(network=None, data=None, **options):
    X = points(24)
    data = (X, labels("gaussian", X, 1)) if data is None else data
    options = {"epochs": 4, "burn_in": 1, "every": 2, "progress": False} | options
    return fit_online(tanh_net() if network is None else network, data, **options)


def equal(fit, other):
    a, b = fit.network.state_dict(), other.network.state_dict()
    same = all(torch.equal(a[name], b[name]) for name in a)
    same = same and fit.losses == other.losses and fit.steps == other.steps
    return same and torch.equal(fit.prior_variance, other.prior_variance)


# -- what it converges to --------------------------------------------------------------


def test_a_linear_model_converges_to_the_evidence_optimum_of_the_exact_gp():
    X = points(40)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(40, 1, generator=generator).double()
    Y = X @ torch.tensor([[0.7], [-1.1], [0.2]]).double() + 0.3 * noise
    fit = fit_online(
        nn.Linear(D, 1).double(),
        (X, Y),
        epochs=120,
        burn_in=20,
        every=2,
        hyper_steps=4,
        batch_size=40,
        learning_rate=0.1,
        schedule=lambda epoch: 0.9 ** max(0, epoch - 80),
        progress=False,
    )
    exact = LinearizedGP(nn.Linear(D, 1).double(), X, Y)
    best = fit_evidence(exact, warn=False)
    assert fit.evidence.value.item() == pytest.approx(best.value.item(), abs=2e-3)
    assert fit.prior_variance.item() == pytest.approx(
        exact.prior_variance.item(), rel=0.02
    )
    assert fit.noise_variance.item() == pytest.approx(
        exact.noise_variance.item(), rel=0.02
    )
    # The trained weights are the posterior mean of that GP.
    mean = exact.posterior(X).mean
    assert (fit.network(X) - mean).abs().max() < 1e-2


CASES = list(
    itertools.product(
        [("gaussian", 1), ("gaussian", 2), ("softmax", 3), ("logistic", 1)],
        ["all", "layer"],
    )
)


def flat_jacobian(net, X):
    params = {name: p.detach() for name, p in net.named_parameters()}
    J = jacrev(lambda p: functional_call(net, p, (X,)))(params)
    return torch.cat([J[name].flatten(2) for name in params], -1)


@pytest.mark.parametrize("structure", [Exact(), Diagonal()], ids=["exact", "diagonal"])
@pytest.mark.parametrize("case, groups", CASES)
def test_value_and_gradient_are_those_of_the_dense_formula(case, groups, structure):
    kind, m = case
    net, X = tanh_net(m), points(15)
    Y = labels(kind, X, m)
    batches = TrainingBatches((X, Y), net, None, 7, None)
    names = weight_groups(batches.net, groups)
    measured = measure_evidence(batches.net, batches, names, structure, 0)
    sizes = [sum(dict(net.named_parameters())[n].numel() for n in g) for g in names]
    w = torch.cat([p.detach().flatten() for p in net.parameters()])
    J, f = flat_jacobian(net, X), net(X).detach()

    def oracle(log_hyper):
        precision = (-log_hyper[: len(names)]).exp()
        noise = log_hyper[len(names) :].exp() if kind == "gaussian" else None
        spread = precision.repeat_interleave(torch.tensor(sizes))
        diagonal = isinstance(structure, Diagonal)
        return oracles.online_evidence(kind, f, J, Y, w, spread, noise, diagonal)

    noise = torch.tensor([-1.5, -0.4])[:m] if kind == "gaussian" else torch.zeros(0)
    at = torch.cat([torch.tensor([0.3, -0.7])[: len(names)], noise]).double()
    hyper = at.clone().requires_grad_()
    own_noise = hyper[len(names) :].exp() if kind == "gaussian" else None
    found = measured(hyper[: len(names)].exp(), own_noise)
    torch.testing.assert_close(found.value, oracle(at), rtol=1e-10, atol=1e-10)
    (gradient,) = torch.autograd.grad(found.value, hyper)
    for i, step in enumerate(1e-5 * torch.eye(len(at)).double()):
        slope = (oracle(at + step) - oracle(at - step)) / 2e-5
        assert gradient[i].item() == pytest.approx(slope.item(), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("groups", ["all", "layer"])
@pytest.mark.parametrize("kind, m", [("gaussian", 1), ("softmax", 3)])
def test_kronecker_is_the_determinant_of_the_dense_factors(kind, m, groups):
    net, X = tanh_net(m), points(15)
    batches = TrainingBatches((X, labels(kind, X, m)), net, None, 5, None)
    names = weight_groups(batches.net, groups)
    evidence = measure_evidence(batches.net, batches, names, Kronecker(), 0)
    at = torch.tensor([0.5, 2.0]).double()[: len(names)]
    noise = torch.tensor([0.25]).double() if kind == "gaussian" else None
    found = evidence(at, noise, True)
    hessians = torch.eye(1).double().expand(15, 1, 1) / 0.25
    if kind == "softmax":
        hessians = softmax_hessians(net(X).detach())
    M = kronecker_of_two_layers(net, X, hessians)
    group_of = {name: g for g, group in enumerate(names) for name in group}
    S = torch.cat(
        [at[group_of[name]].expand(p.numel()) for name, p in net.named_parameters()]
    )
    H = S.sqrt()[:, None] * M * S.sqrt()
    eye = torch.eye(len(H)).double()
    assert found.complexity.item() == pytest.approx(
        0.5 * torch.linalg.slogdet(eye + H).logabsdet.item(), rel=1e-10
    )
    dimension = torch.linalg.solve(eye + H, H).trace().item()
    assert found.effective_dimension.item() == pytest.approx(dimension, rel=1e-10)


STRUCTURES = [
    Kronecker(),
    Kronecker(eigenvalue_correction=True),
    Diagonal(),
    Exact(),
]


@pytest.mark.parametrize("structure", STRUCTURES, ids=["kfac", "ekfac", "diag", "full"])
def test_the_evidence_of_batches_is_that_of_all_data(structure):
    net, X = tanh_net(3), points(23)
    Y = labels("softmax", X, 3)
    values = []
    for data in ((X, Y), loader(X, Y, 5), [(X[:20], Y[:20]), (X[20:], Y[20:])]):
        batches = TrainingBatches(data, net, None, 5, None)
        names = weight_groups(batches.net, "layer")
        evidence = measure_evidence(batches.net, batches, names, structure, 0)
        found = evidence(torch.tensor([0.5, 2.0]).double(), None, True)
        values.append(torch.stack(found[:4]))
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=1e-10, atol=1e-10)


def test_training_with_a_fixed_order_is_the_loop_that_a_user_would_write():
    X = points(24)
    Y, net = labels("gaussian", X, 1), tanh_net()
    fit = run(net, [(X[:12], Y[:12]), (X[12:], Y[12:])], epochs=3, burn_in=9)
    own = copy.deepcopy(net)
    optimizer = torch.optim.Adam(own.parameters(), lr=5e-3)
    noise, n = fit.likelihood.noise.item(), 24
    for _ in range(3):
        for rows in (slice(0, 12), slice(12, 24)):
            optimizer.zero_grad()
            squares = sum(p.square().sum() for p in own.parameters())
            nats = (Y[rows] - own(X[rows])).square().mean() / (2 * noise)
            # In squared units of the targets, as fit_map: nats times the noise.
            (noise * (nats + 0.5 * squares / n)).backward()
            optimizer.step()
    for mine, theirs in zip(own.parameters(), fit.network.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind, m", [("gaussian", 2), ("softmax", 3), ("logistic", 1)])
def test_defaults_serve_every_likelihood_and_keep_the_dtype(kind, m):
    X = points(30, torch.float32)
    Y = labels(kind, X.double(), m)
    Y = Y.float() if Y.is_floating_point() else Y
    net = Nested(m)
    fit = fit_online(net, (X, Y), epochs=20, progress=False)
    assert [step.epoch for step in fit.steps] == [4, 8, 12, 16, 20]
    assert {p.dtype for p in fit.network.parameters()} == {torch.float32}
    assert fit.losses[-1] < fit.losses[0] and not fit.network.training
    assert (fit.noise_variance is None) == (kind != "gaussian")
    assert fit.prior_variance.item() != 1.0
    assert "5 updates" in repr(fit)
    model = fit.model(X, Y)
    assert model.prior_variance.item() == pytest.approx(fit.prior_variance.item(), 1e-4)
    if kind == "gaussian":
        torch.testing.assert_close(
            model.noise_variance.double(), fit.noise_variance, rtol=1e-4, atol=0.0
        )
    assert "online evidence" in repr(model)
    assert torch.isfinite(model.posterior(X[:2]).variance).all()


def test_learning_finds_more_evidence_than_it_started_from():
    found = run(epochs=30, burn_in=0, learning_rate=0.05)
    kept = run(epochs=30, burn_in=30, learning_rate=0.05)
    assert found.evidence.value > kept.evidence.value + 2
    assert found.steps[-1].evidence > found.steps[0].evidence


def test_monte_carlo_curvature_is_close_on_average():
    X = points(300)
    Y = labels("softmax", X, 3)
    batches = TrainingBatches((X, Y), tanh_net(3), None, 5, None)
    names = weight_groups(batches.net, "all")
    one = torch.ones(1).double()
    exact = measure_evidence(batches.net, batches, names, Kronecker(), 0)(one, None)
    drawn = Kronecker(curvature="monte_carlo", num_samples=8)
    got = measure_evidence(batches.net, batches, names, drawn, 0)(one, None)
    assert got.complexity.item() == pytest.approx(exact.complexity.item(), rel=0.03)


# -- when, and from where --------------------------------------------------------------


@pytest.mark.parametrize(
    "burn_in, every, expected", [(0, 1, [1, 2, 3, 4, 5]), (2, 2, [4]), (5, 1, [])]
)
def test_burn_in_and_frequency_say_when_hyperparameters_move(burn_in, every, expected):
    fit = run(epochs=5, burn_in=burn_in, every=every)
    assert [step.epoch for step in fit.steps] == expected
    history = fit.history
    assert history["loss"].shape == (5,)
    if expected:
        assert history["epoch"].tolist() == expected
        assert history["prior_variance"].shape == (len(expected), 1)
        value = history["fit"] - history["complexity"]
        torch.testing.assert_close(history["evidence"], value)
    else:
        assert fit.prior_variance.item() == pytest.approx(1.0)


def data_of(kind):
    X = points(24, torch.float32)
    Y = labels("softmax", X.double(), 3)
    if kind == "tensors":
        return X, Y
    return loader(X, Y, 8, shuffle=True)


@pytest.mark.parametrize("kind", ["tensors", "loader"])
def test_an_interrupted_run_continues_to_the_same_bits(tmp_path, kind):
    net, file = Nested(3), tmp_path / "run"
    options = {"epochs": 6, "burn_in": 1, "checkpoint_every": 2, "checkpoint": file}
    whole = run(net, data_of(kind), **options | {"checkpoint": None})

    class Killed(Exception):
        pass

    def kill(training):
        if training.epoch == 5:  # one epoch after the last checkpoint
            raise Killed

    with pytest.raises(Killed):
        run(net, data_of(kind), callback=kill, **options)
    assert equal(run(net, data_of(kind), **options), whole)
    assert equal(run(net, data_of(kind), **options), whole)  # nothing is left to do
    with pytest.raises(ValueError, match="has 6 epochs already, and epochs is 3"):
        run(net, data_of(kind), **options | {"epochs": 3})
    with pytest.raises(ValueError, match="its frequency is 2, and now it is 1"):
        run(net, data_of(kind), every=1, **options)


def test_other_targets_of_a_loader_are_another_run(tmp_path):
    X = points(24)
    Y, options = labels("gaussian", X, 1), {"checkpoint": tmp_path / "run"}
    run(None, loader(X, Y, 8, shuffle=True), **options)
    run(None, loader(X.flip(0), Y.flip(0), 8, shuffle=True), **options)  # the same
    with pytest.raises(ValueError, match="its targets is .* checksum"):
        run(None, loader(X, Y + 5, 8, shuffle=True), **options)


def test_inputs_are_hashed_once_and_only_for_checkpoints(tmp_path, monkeypatch):
    checksum, seen = training_batches.checksum, []

    def counted(value):
        seen.append(value.shape)
        return checksum(value)

    monkeypatch.setattr(training_batches, "checksum", counted)
    run()
    assert seen == [(24, 1)]
    run(checkpoint=tmp_path / "run", checkpoint_every=1)
    assert seen[1:] == [(24, 1), (24, D)]


def test_a_callback_that_looks_at_the_evidence_changes_nothing():
    net, X = Nested().double(), points(24)
    data = (X, labels("gaussian", X, 1))  # with dropout
    found = run(net, data, callback=lambda training: training.evidence() is None)
    assert equal(found, run(net, data))


@pytest.mark.parametrize("m", [1, 2])
def test_the_noise_stays_between_both_bounds_of_its_constraint(m):
    X = points(24)
    Y = labels("gaussian", X, m)
    bounds = Interval(1e-6, 0.02)
    likelihood = GaussianLikelihood(noise_constraint=bounds)
    if m == 2:
        likelihood = MultitaskGaussianLikelihood(
            2, noise_constraint=bounds, has_global_noise=False
        )
    fit = run(tanh_net(m), (X, Y), likelihood=likelihood.double(), epochs=8)
    # The residuals of an untrained network ask for more.
    assert fit.noise_variance.tolist() == pytest.approx([0.02] * m, rel=1e-5)
    own = fit.likelihood.noise if m == 1 else fit.likelihood.task_noises
    torch.testing.assert_close(own.reshape(-1), fit.noise_variance)
    assert all(p.isfinite().all() for p in fit.likelihood.parameters())


def test_a_finished_run_can_be_prolonged(tmp_path):
    short = {"checkpoint": tmp_path / "run", "epochs": 3}
    run(**short)
    assert equal(run(**short | {"epochs": 5}), run(epochs=5))


def test_seeds_decide_and_nothing_of_the_users_changes():
    net, X = Nested().double().train(), points(24)
    likelihood = GaussianLikelihood(noise_constraint=GreaterThan(1e-6)).double()
    state, before = torch.get_rng_state(), copy.deepcopy(likelihood.state_dict())
    data = (X, labels("gaussian", X, 1))

    def fit(seed):
        generator = torch.Generator().manual_seed(seed)
        return run(net, data, likelihood=likelihood, generator=generator)

    with assert_module_unchanged(net):
        first, again, other = fit(1), fit(1), fit(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(likelihood.raw_noise, before["noise_covar.raw_noise"])
    assert equal(first, again) and not equal(first, other)


def test_a_noise_without_gradient_stays():
    likelihood = GaussianLikelihood().double()
    likelihood.noise = 0.37
    likelihood.requires_grad_(False)
    fit = run(likelihood=likelihood)
    assert fit.noise_variance.item() == pytest.approx(0.37)
    assert not any(p.requires_grad for p in fit.likelihood.parameters())


def test_frozen_weights_have_no_prior_and_do_not_move():
    net = tanh_net()
    net[0].requires_grad_(False)
    fit = run(net)
    assert fit.groups == [["2.weight", "2.bias"]]
    assert torch.equal(fit.network[0].weight, net[0].weight)


def test_images_and_any_optimiser_are_taken():
    X = points(24)[:, :, None].expand(-1, -1, 4).reshape(24, 1, 3, 4)
    Y = labels("softmax", points(24), 3)
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))

    def sgd(params):
        return torch.optim.SGD(params, lr=0.05, momentum=0.9)

    fit = run(net.double(), (X, Y), optimizer=sgd, groups="layer")
    assert fit.input_shape == (1, 3, 4) and len(fit.prior_variance) == 2
    assert fit.model(X, Y).predict(X[:2].flatten(1)).probs.shape == (2, 3)
    data, shape = (X.flatten(1), Y), (1, 3, 4)
    rows = run(net, data, optimizer=sgd, groups="layer", input_shape=shape)
    assert equal(rows, fit)


# -- what goes wrong -------------------------------------------------------------------


def test_divergence_raises_and_keeps_the_last_good_fit():
    def schedule(epoch):
        return 1.0 if epoch < 2 else 1e300

    message = r"in epoch 2\. The fit .* try learning_rate=0.0005"
    with pytest.raises(DivergedError, match=message) as info:
        run(schedule=schedule, epochs=5)
    good = info.value.last_good
    assert isinstance(good, OnlineFit) and good.evidence is None
    assert "unknown" in repr(good)
    with pytest.warns(ReliabilityWarning, match="never moved: .* after epoch 3"):
        short = run(epochs=2)
    assert equal(good, short)


def test_weights_that_are_not_finite_are_named():
    message = (
        r"weights that are not finite, after a mean loss of \d\S* nats, in epoch 1"
    )
    with pytest.raises(DivergedError, match=message):
        # One batch: the loss is that before the step.
        run(schedule=lambda epoch: math.nan if epoch else 1.0, epochs=5)


def test_an_evidence_that_is_not_finite_keeps_the_last_good_fit(monkeypatch):
    measure, calls = online_training.measure_evidence, []

    def broken(*args):
        calls.append(args)
        found = measure(*args)
        if len(calls) == 2:
            found.misfit = found.misfit * math.nan
        return found

    monkeypatch.setattr(online_training, "measure_evidence", broken)
    message = "an evidence of nan nats in epoch 4"
    with pytest.raises(DivergedError, match=message) as info:
        run(epochs=7)
    monkeypatch.undo()
    good = info.value.last_good
    reference = run(epochs=4)
    assert equal(good, reference) and torch.isfinite(good.noise_variance).all()


def test_an_interruption_returns_what_there_is():
    def interrupt(training):
        if training.epoch == 3:
            raise KeyboardInterrupt

    with pytest.warns(RuntimeWarning, match="interrupted after 3 of 9 epochs"):
        fit = run(epochs=9, callback=interrupt)
    assert equal(fit, run(epochs=3))
    stopped = run(epochs=9, callback=lambda training: training.epoch == 2)
    assert len(stopped.losses) == 2


class Norm(nn.Module):
    """A layer, a normalisation without weights, another layer."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.last = nn.Linear(D, 5), nn.Linear(5, 1)
        self.norm = {
            "batch": nn.BatchNorm1d(5, affine=False),
            "layer": nn.LayerNorm(5, elementwise_affine=False),
            "none": nn.Identity(),
        }[kind]

    def forward(self, x):
        return self.last(self.norm(self.first(x)).relu())


@pytest.mark.parametrize("kind", ["batch", "layer"])
def test_a_prior_of_weights_before_a_normalisation_warns(kind):
    net = Norm(kind).double()
    with pytest.warns(UserWarning, match="scale of first.weight, first.bias does not"):
        run(net, groups="layer", epochs=1)
    run(net, groups="all", epochs=1)  # and not here,
    run(Norm("none").double(), groups="layer", epochs=1)  # nor here


def test_a_prior_beyond_the_models_bounds_is_moved_with_a_warning():
    X = points(24)
    Y = labels("gaussian", X, 1)
    fit = run()
    fit.prior_variance.fill_(1e-30)
    with pytest.warns(UserWarning, match="leave the bounds of the model"):
        assert fit.model(X, Y).prior_variance.item() > 1e-12


class Shrinking:
    """A loader that loses a batch after the first pass."""

    def __init__(self, sizes):
        self.sizes = iter(sizes)

    def __iter__(self):
        X = points(24)
        Y = labels("gaussian", X, 1)
        for _ in range(next(self.sizes)):
            yield X[:8], Y[:8]


FIXED = FixedNoiseGaussianLikelihood(torch.ones(24))
MIXED = (points(4), points(4)[:, :1].float())
BAD = [
    (dict(network=3), TypeError, "network must be a torch.nn.Module, but is int"),
    (dict(data=points(4)), TypeError, "pair of tensors .* but is Tensor"),
    (dict(data=3), TypeError, "or a loader of such pairs, but is int"),
    (dict(data=iter([])), TypeError, "iterable more than once, but is list_iterator"),
    (dict(data=[]), ValueError, "gives no batch"),
    (dict(data=[points(4)]), TypeError, "must be a pair .* but one is Tensor"),
    (dict(data=[(points(4),) * 3]), TypeError, "but one is a tuple of 3"),
    (dict(data=Shrinking([3, 2])), ShapeError, "24 rows in its first pass and only 16"),
    (dict(data=Shrinking([2, 3])), ShapeError, "16 rows in its first pass and more"),
    (dict(data=(points(4), points(5))), ShapeError, "numbers of rows must agree"),
    (dict(data=(points(4), points(4))), ShapeError, "4 x 1"),
    (dict(data=(math.nan * points(4), points(4))), InputDataError, "in 4 of 4"),
    (dict(data=(points(4).float(), points(4))), TypeError, "float64, but train_X"),
    (dict(epochs=0), ValueError, "epochs must be a whole number above zero"),
    (dict(every=0), ValueError, "every must be a whole number above zero"),
    (dict(burn_in=-1), ValueError, "burn_in must be a number of epochs, but is -1"),
    (dict(prior_variance=0.0), ValueError, "prior_variance must be positive"),
    (dict(groups="some"), ValueError, "groups must be one of 'all', 'layer', 'tensor'"),
    (dict(structure=LowRank()), TypeError, r"Kronecker\(...\), .* but is LowRank"),
    (dict(structure=Exact(memory_budget=10)), MemoryError, "full curvature of 31"),
    (dict(structure=Kronecker(memory_budget=10)), MemoryError, "Diagonal"),
    (dict(structure=Kronecker(curvature="empirical")), ValueError, "without bound"),
    (dict(likelihood=FIXED), NotImplementedError, "one noise variance per output"),
    (dict(optimizer=lambda p: 3), TypeError, "torch.optim.Optimizer, .* returned int"),
    (dict(optimizer=lambda p: torch.optim.SGD(p[:1], 0.1)), ValueError, "moves 1 tens"),
    (dict(optimizer=lambda p: torch.optim.AdamW(p)), ValueError, "weight_decay=0.01"),
    (dict(optimizer=torch.optim.LBFGS), TypeError, "LBFGS asks for a closure"),
    (dict(data=MIXED), TypeError, "train_Y must be torch.float64 .* is torch.float32"),
    (dict(data=[MIXED]), TypeError, "train_Y must be torch.float64"),
    (dict(checkpoint="/nowhere/run"), FileNotFoundError, "folder of checkpoint"),
]  # fmt: skip


@pytest.mark.parametrize("options, error, message", BAD)
def test_bad_input_says_what_to_do(options, error, message):
    with pytest.raises(error, match=message):
        run(**options)


def test_a_likelihood_is_known_by_its_type():
    class GaussianLabels(BernoulliLikelihood):
        """Labels, whatever its name."""

    check_learnable(GaussianLabels())
    with pytest.raises(NotImplementedError, match="this LaplaceLikelihood does not"):
        check_learnable(LaplaceLikelihood())


def test_correlated_noise_is_refused():
    X = points(24)
    likelihood = MultitaskGaussianLikelihood(2, rank=1).double()
    with pytest.raises(NotImplementedError, match="MultitaskGaussianLikelihood"):
        run(tanh_net(2), (X, labels("gaussian", X, 2)), likelihood=likelihood)


def test_batch_norm_refuses_batches_of_one_row():
    X = points(3)
    with pytest.raises(ValueError, match="batch normalisation, which needs batches"):
        run(Nested().double(), (X, labels("gaussian", X, 1)), batch_size=1)
    with pytest.raises(ValueError, match="No batch was trained on"):
        run(Nested().double(), loader(X, labels("gaussian", X, 1), 1))
