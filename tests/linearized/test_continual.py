"""Data sets one after the other: one posterior is the prior of the next."""

import copy
import pickle

import pytest
import torch
from gpytorch.likelihoods import GaussianLikelihood
from torch import nn
from torch.distributions import MultivariateNormal

from gpbridge import Exact, LinearizedGP
from gpbridge.checks import ShapeError
from gpbridge.dnn.log_posterior import LogPosterior
from gpbridge.functional import FunctionalNet
from gpbridge.linearized import Diagonal, Kronecker, LowRank, weight_posterior
from gpbridge.linearized.structured_weights import add_curvatures, combine_channels
from gpbridge.subnetworks import largest_magnitude
from tests.linearized import problems
from tests.linearized.problems import PROBLEMS, build

D = 4
STRUCTURES = {
    "diagonal": Diagonal(),
    "expand": Kronecker(),
    "corrected": Kronecker(eigenvalue_correction=True),
    "low_rank": LowRank(rank=D + 1),
}
every_structure = pytest.mark.parametrize("structure", STRUCTURES)
EXACT = {"rtol": 1e-7, "atol": 1e-9}


def source(seed):
    return torch.Generator().manual_seed(seed)


def line(bias=True):
    """A network that is linear in its weights."""
    network = nn.Linear(D, 1, bias).double()
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=source(5)))
    return network


def task(seed, orthogonal=False, n=9):
    X = torch.randn(n, D, generator=source(seed), dtype=torch.float64)
    if orthogonal:
        scale = torch.linspace(0.5, 2, D, dtype=torch.float64).roll(seed)
        X = torch.linalg.qr(X).Q * scale
    return X, torch.randn(n, 1, generator=source(seed + 50), dtype=torch.float64)


def gaussian(noise):
    likelihood = GaussianLikelihood().double()
    likelihood.noise = torch.tensor([noise], dtype=torch.float64)
    return likelihood


def model(data, structure, noise=0.1, network=None, **options):
    bias = structure != "diagonal"
    made = LinearizedGP(
        line(bias) if network is None else network,
        *data,
        gaussian(noise),
        inference=STRUCTURES[structure],
        **options,
    )
    if "previous" not in options:
        made.prior_variance = 0.5
    return made


def bayesian_regression(tasks, noises, bias):
    """Bishop (2006), eqs. (3.50) and (3.51), at the prior variance 0.5."""
    rows = [
        torch.cat([X, torch.ones(len(X), 1).double()], -1) if bias else X
        for X, _ in tasks
    ]
    precision = torch.eye(rows[0].shape[-1], dtype=torch.float64) / 0.5
    information = torch.zeros(len(precision), 1, dtype=torch.float64)
    for Phi, (_, y), noise in zip(rows, tasks, noises, strict=True):
        precision = precision + Phi.mT @ Phi / noise
        information = information + Phi.mT @ y / noise
    return torch.linalg.solve(precision, information)[:, 0], precision


@every_structure
@pytest.mark.parametrize("noises", [(0.1, 0.1), (0.1, 0.4)])
def test_two_tasks_in_sequence_equal_both_at_once(structure, noises):
    orthogonal = structure == "diagonal"
    tasks = [task(1, orthogonal), task(2, orthogonal)]
    mean, precision = bayesian_regression(tasks, noises, not orthogonal)
    X_test = task(9)[0]
    Phi = X_test if orthogonal else torch.cat([X_test, torch.ones(9, 1).double()], -1)
    covariance = Phi @ torch.linalg.solve(precision, Phi.mT)
    for order in ((0, 1), (1, 0)):
        first, second = (tasks[k] for k in order)
        one = model(first, structure, noises[order[0]])
        moved = line(not orthogonal)
        with torch.no_grad():
            moved.weight.add_(0.3)  # trained further, to wherever
        previous = weight_posterior(one)
        two = model(second, structure, noises[order[1]], moved, previous=previous)
        posterior = two.posterior(X_test)
        torch.testing.assert_close(posterior.mean[:, 0], Phi @ mean, **EXACT)
        got = posterior.distribution.covariance_matrix
        torch.testing.assert_close(got, covariance, **EXACT)
        final = weight_posterior(two)
        torch.testing.assert_close(final.mean, mean, **EXACT)
        eye = torch.eye(len(mean), dtype=torch.float64)
        torch.testing.assert_close(final.precision_product(eye), precision, **EXACT)
        drawn = two.draw(2000, source(0))(X_test)[..., 0]
        error = (drawn.mean(0) - Phi @ mean) / covariance.diagonal().sqrt()
        assert error.abs().max() < 6 / 2000**0.5


def test_three_tasks_go_on_from_two():
    tasks = [task(seed) for seed in range(3)]
    mean, precision = bayesian_regression(tasks, [0.1] * 3, True)
    previous = weight_posterior(model(tasks[0], "expand"))
    for data in tasks[1:]:
        previous = weight_posterior(model(data, "expand", previous=previous))
    torch.testing.assert_close(previous.mean, mean, **EXACT)
    eye = torch.eye(D + 1, dtype=torch.float64)
    torch.testing.assert_close(previous.precision_product(eye), precision, **EXACT)


def test_the_mean_by_products_is_that_of_a_factor(monkeypatch):
    tasks = [task(1), task(2)]
    previous = weight_posterior(model(tasks[0], "expand"))
    expected = model(tasks[1], "expand", previous=previous).posterior(task(9)[0])
    monkeypatch.setattr("gpbridge.linearized.structured_problem._DENSE", 0)
    got = model(tasks[1], "expand", previous=previous).posterior(task(9)[0])
    # To a thousandth of a posterior standard deviation.
    error = (got.mean - expected.mean).abs() / expected.variance.sqrt()
    assert error.max() < 1e-3


# -- the density ----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:LowRank")
@every_structure
def test_the_density_is_that_of_the_dense_gaussian(structure):
    options = {"inference": STRUCTURES[structure], "groups": "tensor"}
    fitted = build("softmax", **options)
    previous = weight_posterior(fitted)
    problem = fitted.problem
    M = problem.curvature.dense(torch.ones(1).double())
    H = M + (1 / previous.variance).diag()
    params = {
        name: value.detach() + 0.1 * torch.randn(value.shape, generator=source(3))
        for name, value in fitted.functional.params.items()
    }
    flat = fitted.functional.flatten(params)
    mean = fitted.functional.flatten(fitted.functional.params)
    expected = MultivariateNormal(mean, precision_matrix=(H + H.mT) / 2).log_prob(flat)
    assert previous(params).item() == pytest.approx(expected.item(), rel=1e-9)
    eye = torch.eye(len(H), dtype=torch.float64)
    torch.testing.assert_close(previous.precision_product(eye), H, **EXACT)


def test_training_under_the_first_posterior_finds_the_optimum_of_both():
    tasks, likelihood = [task(1), task(2)], gaussian(0.1)
    mean, _ = bayesian_regression(tasks, [0.1, 0.1], True)
    net = FunctionalNet(line())
    log_posterior = LogPosterior(
        net, likelihood, 9, prior=weight_posterior(model(tasks[0], "expand"))
    )
    params = {n: p.detach().clone().requires_grad_() for n, p in net.params.items()}
    optimizer = torch.optim.LBFGS(
        list(params.values()), max_iter=200, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = -log_posterior(params, *tasks[1])
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(net.flatten(params).detach(), mean, rtol=0, atol=1e-4)


# -- real networks --------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["diagonal", "expand", "corrected"])
@pytest.mark.parametrize("name", ["multitask", "softmax"])
def test_more_data_leave_less_variance(name, structure):
    options = {"inference": STRUCTURES[structure], "groups": "layer"}
    first = build(name, **options)
    previous = weight_posterior(first)
    X = problems.inputs(8, seed=4)
    Y = problems.targets(name, X)
    second = LinearizedGP(
        problems.network(PROBLEMS[name].m),
        X,
        Y,
        PROBLEMS[name].make(),
        previous=previous,
        **options,
    )
    X_test = problems.inputs(5, seed=9)
    before, after = first.posterior(X_test), second.posterior(X_test)
    assert (after.variance.sum() < before.variance.sum()).all()
    torch.testing.assert_close(second.prior_variance, first.prior_variance)
    if name == "softmax":
        torch.testing.assert_close(after.mean, before.mean)  # the network's output
        assert second.predict(X_test, link="plugin").probs.shape == (5, 3)


def test_sums_in_a_common_basis_keep_diagonal_and_trace():
    curvatures = []
    for seed in (0, 4):
        X = problems.inputs(seed=seed)
        fitted = build("softmax", X=X, inference=Kronecker())
        with torch.no_grad():  # other weights, so that the factors do not commute
            for w in fitted.functional.parameters():
                w.mul_(1 + seed)
        curvatures.append(fitted.problem.curvature)
    one = torch.ones(1, dtype=torch.float64)
    first, second = (combine_channels(c, one) for c in curvatures)
    total, parts = add_curvatures(first, second), first.dense(one) + second.dense(one)
    got = total.dense(one)
    assert got.trace().item() == pytest.approx(parts.trace().item())
    # The nearest to the sum among those that are diagonal in its basis.
    for block, (Q, P) in zip(total.blocks, total.bases, strict=True):
        index = torch.arange(total.num_params)
        rows = block.take(index).reshape(-1)
        basis = torch.kron(
            *(
                torch.eye(k).double() if q is None else q
                for q, k in ((Q, block.o), (P, block.i))
            )
        )
        own, exact = (M[rows[:, None], rows] for M in (got, parts))
        torch.testing.assert_close(
            (basis.mT @ own @ basis).diagonal(), (basis.mT @ exact @ basis).diagonal()
        )
    eye = torch.linalg.eigvalsh(got)
    assert eye.min() > -1e-9
    double = add_curvatures(first, first).dense(one)
    torch.testing.assert_close(double, 2 * first.dense(one), rtol=1e-6, atol=1e-8)


def test_a_subnetwork_goes_on():
    masks = largest_magnitude(problems.network(), 9)
    options = {"inference": Diagonal(), "parameters": masks}
    previous = weight_posterior(build("gaussian", **options))
    X = problems.inputs(8, seed=4)
    second = LinearizedGP(
        problems.network(),
        X,
        problems.targets("gaussian", X),
        previous=previous,
        **options,
    )
    assert second.posterior(X).variance.shape == (8, 1)


def test_copies_pickles_and_states_keep_the_previous_posterior():
    previous = weight_posterior(model(task(1), "expand"))
    two, X = model(task(2), "expand", previous=previous), task(9)[0]
    expected = two.posterior(X)
    for twin in (copy.deepcopy(two), pickle.loads(pickle.dumps(two))):
        torch.testing.assert_close(twin.posterior(X).variance, expected.variance)
        torch.testing.assert_close(twin.posterior(X).mean, expected.mean)
    other = model(task(3), "expand", previous=previous)
    other.load_state_dict(two.state_dict())
    torch.testing.assert_close(other.posterior(X).mean, expected.mean)
    third = weight_posterior(model(task(4), "expand"))
    other = model(task(2), "expand", previous=third)
    other.load_state_dict(two.state_dict())
    torch.testing.assert_close(other.posterior(X).mean, expected.mean)
    two.float()
    got = two.posterior(X.float()).mean.double()
    torch.testing.assert_close(got, expected.mean, rtol=0, atol=1e-3)
    assert repr(previous) == "StructuredWeights(p=5, FactoredCurvature)"


# -- bad input ------------------------------------------------------------------------


def test_models_without_a_posterior_over_weights_are_named():
    with pytest.raises(TypeError, match="inference is Exact. Pass inference=Kronecker"):
        weight_posterior(build("gaussian", inference=Exact()))
    with pytest.raises(ValueError, match="g_prior scales each weight"):
        weight_posterior(build("gaussian", inference=Diagonal(), g_prior=True))
    with pytest.raises(NotImplementedError, match="without offset are not those"):
        weight_posterior(build("softmax", inference=Diagonal(), mean="linear_model"))
    conditioned = model(task(1), "expand").condition_on_observations(*task(2))
    with pytest.raises(NotImplementedError, match="posterior over weights is that of"):
        weight_posterior(conditioned)


def test_a_previous_posterior_of_another_kind_is_refused():
    first = weight_posterior(model(task(1), "expand"))
    second = task(2)
    with pytest.raises(TypeError, match="weight_posterior gives, but is LinearizedGP"):
        model(second, "expand", previous=model(task(1), "expand"))
    with pytest.raises(TypeError, match=r"Kronecker\(...\), but inference is Diagonal"):
        model(second, "diagonal", network=line(), previous=first)
    with pytest.raises(TypeError, match="Kronecker.* but inference is LowRank"):
        model(second, "low_rank", previous=first)
    wide = nn.Linear(D, 1, bias=False).double()
    with pytest.raises(ValueError, match=r"over weight \(1, 4\), bias \(1,\), but"):
        model(second, "expand", network=wide, previous=first)
    with pytest.raises(ValueError, match="other groups"):
        model(second, "expand", previous=first, groups="tensor")
    with pytest.raises(ValueError, match="g_prior=True scales weights by these data"):
        model(second, "expand", previous=first, g_prior=True)
    with pytest.raises(ValueError, match="needs Gaussian noise and offset=True"):
        model(second, "expand", previous=first, offset=False)


def test_what_a_previous_posterior_does_not_give_is_refused():
    two = model(task(2), "expand", previous=weight_posterior(model(task(1), "expand")))
    with pytest.raises(NotImplementedError, match="evidence is not there for a model"):
        two.log_evidence()
    two.train()
    with pytest.raises(NotImplementedError, match="prior covariance is not there"):
        two(task(2)[0])


def test_the_density_names_weights_that_do_not_fit():
    previous = weight_posterior(model(task(1), "expand"))
    with pytest.raises(ValueError, match=r"params lacks \['bias'\]"):
        previous({"weight": torch.zeros(1, D)})
    with pytest.raises(
        ShapeError, match=r"bias must have shape \(1,\), but has \(2,\)"
    ):
        previous({"weight": torch.zeros(1, D), "bias": torch.zeros(2)})


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_posterior_over_weights_is_saved_without_a_pickle(structure, tmp_path):
    previous = weight_posterior(model(task(1), structure))
    torch.save(previous.state_dict(), tmp_path / "posterior.pt")
    state = torch.load(tmp_path / "posterior.pt", weights_only=True)
    twin = type(previous).from_state_dict(state)
    columns = torch.randn(len(previous.mean), 2, generator=source(0)).double()
    for one, two in (
        (previous.precision_product(columns), twin.precision_product(columns)),
        (previous.mean, twin.mean),
    ):
        torch.testing.assert_close(one, two, rtol=0.0, atol=0.0)
    X = task(9)[0]
    models = [model(task(2), structure, previous=p) for p in (previous, twin)]
    a, b = (each.posterior(X).variance for each in models)
    torch.testing.assert_close(a, b, rtol=0.0, atol=0.0)
    with pytest.raises(ValueError, match="state_dict"):
        type(previous).from_state_dict({"mean": previous.mean})


def test_the_state_of_a_model_has_its_previous_posterior():
    previous = weight_posterior(model(task(1), "expand"))
    two, X = model(task(2), "expand", previous=previous), task(9)[0]
    other = model(task(3), "expand")
    other.load_state_dict(two.state_dict())
    torch.testing.assert_close(other.posterior(X).variance, two.posterior(X).variance)
    assert "after a previous posterior" in repr(other)
    other.load_state_dict(model(task(3), "expand").state_dict())
    assert other.previous is None
    with pytest.raises(TypeError, match="Pass the same structure"):
        model(task(3), "diagonal", network=line()).load_state_dict(two.state_dict())


def test_a_state_with_a_curvature_serves_an_exact_model():
    two, X = model(task(2), "expand"), task(9)[0]
    two.posterior(X)
    exact = LinearizedGP(line(), *task(2), gaussian(0.1))
    exact.load_state_dict(two.state_dict())
    assert exact.posterior(X).variance.isfinite().all()


class Reordered(nn.Module):
    """The same weights as another network, registered in another order."""

    def __init__(self, first, second):
        super().__init__()
        made = {"a": nn.Linear(D, 3), "b": nn.Linear(3, 1)}
        for name in (first, second):
            setattr(self, name, made[name])

    def forward(self, x):
        return self.b(self.a(x).tanh())


def test_a_previous_posterior_of_weights_in_another_order_is_refused():
    first = model(task(1), "expand", network=Reordered("a", "b").double())
    with pytest.raises(ValueError, match="Pass the same architecture"):
        model(
            task(2),
            "expand",
            network=Reordered("b", "a").double(),
            previous=weight_posterior(first),
        )


def test_a_previous_posterior_of_other_entries_is_refused():
    def masked(places, **options):
        mask = torch.zeros(1, D, dtype=torch.bool)
        mask[0, places] = True
        return model(
            task(1), "diagonal", network=line(), parameters={"weight": mask}, **options
        )

    previous = weight_posterior(masked([0, 1]))
    masked([0, 1], previous=previous)
    with pytest.raises(ValueError, match="other single entries"):
        masked([1, 3], previous=previous)
