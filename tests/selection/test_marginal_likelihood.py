"""The log evidence of every class of model: total, without priors, honest about it."""

import copy

import gpytorch
import pytest
import torch
from botorch.exceptions.warnings import UserInputWarning
from botorch.models import (
    KroneckerMultiTaskGP,
    ModelListGP,
    MultiTaskGP,
    SingleTaskGP,
    SingleTaskVariationalGP,
)
from botorch.models.transforms import Standardize
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import InducingPointKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    GaussianLikelihood,
    MultitaskGaussianLikelihood,
    SoftmaxLikelihood,
)
from gpytorch.means import ZeroMean
from gpytorch.mlls import ExactMarginalLogLikelihood, VariationalELBO
from gpytorch.models import ApproximateGP, ExactGP
from gpytorch.settings import max_cholesky_size
from gpytorch.variational import (
    CholeskyVariationalDistribution,
    DeltaVariationalDistribution,
    UnwhitenedVariationalStrategy,
    VariationalStrategy,
)

from gpbridge import LinearizedGP
from gpbridge.checks import ShapeError
from gpbridge.kernels import NeuralTangentKernel
from gpbridge.linearized import Diagonal, Kronecker
from gpbridge.selection import evidence_parts, log_evidence
from gpbridge.selection import variational_bound as bound_file
from gpbridge.selection.gaussian_marginal import gaussian_marginal
from tests import oracles_selection as oracles
from tests.cases import Nested
from tests.linearized.problems import build

N, NOISE = 14, 0.05
quiet = pytest.mark.filterwarnings("ignore:Data .outcome observations. is not stand")


def data(n=N, m=1, d=2):
    generator = torch.Generator().manual_seed(3)
    X = torch.rand(n, d, generator=generator, dtype=torch.float64)
    waves = torch.sin(4 * X.sum(-1, keepdim=True) + torch.arange(m))
    draws = torch.randn(n, m, generator=generator, dtype=torch.float64)
    return X, waves + NOISE**0.5 * draws


def likelihood():
    made = GaussianLikelihood().double()
    made.noise = torch.tensor([NOISE], dtype=torch.float64)
    return made


def kernel():
    made = ScaleKernel(RBFKernel()).double()
    made.outputscale, made.base_kernel.lengthscale = 1.3, 0.4
    return made


def single(X, Y, **options):
    """A GP with mean zero and known hyperparameters, in the units of its targets."""
    options = {"covar_module": kernel(), "likelihood": likelihood(), **options}
    return SingleTaskGP(X, Y, mean_module=ZeroMean(), outcome_transform=None, **options)


class Multitask(ExactGP):
    """Tasks with a covariance, points or tasks as the fast index."""

    def __init__(self, X, Y, rank=0, interleaved=True):
        super().__init__(X, Y, MultitaskGaussianLikelihood(2, rank=rank))
        self.mean_module = gpytorch.means.MultitaskMean(
            gpytorch.means.ConstantMean(), 2
        )
        self.covar_module = gpytorch.kernels.MultitaskKernel(RBFKernel(), 2, rank=1)
        self.interleaved = interleaved
        self.double()
        with torch.no_grad():
            self.covar_module.task_covar_module.covar_factor.copy_(
                torch.tensor([[1.0], [0.5]])
            )

    def forward(self, X):
        joint = self.covar_module(X)
        if not self.interleaved:
            n = len(X)
            order = torch.arange(2 * n).reshape(n, 2).mT.reshape(-1)
            joint = joint.to_dense()[order][:, order]
        mean = self.mean_module(X)
        return MultitaskMultivariateNormal(mean, joint, interleaved=self.interleaved)


class Sparse(ApproximateGP):
    """A variational GP of gpytorch's own, mean zero."""

    def __init__(
        self, Z, strategy=VariationalStrategy, q=CholeskyVariationalDistribution
    ):
        super().__init__(strategy(self, Z, q(len(Z)), learn_inducing_locations=False))
        self.covar_module = kernel()
        self.double()

    def forward(self, X):
        return MultivariateNormal(X.new_zeros(X.shape[:-1]), self.covar_module(X))


MODELS = (
    *("default", "two outputs", "fixed noise", "multitask", "correlated noise"),
    *("long format", "kronecker", "batch"),
)


def build_exact(name):
    X, Y = data(m=2)
    rows = [torch.cat([X, torch.full((N, 1), t)], 1) for t in (0.0, 1.0)]
    long_X, long_Y = torch.cat(rows), Y.mT.reshape(-1, 1)
    noise = torch.linspace(0.01, 0.1, N).double()[:, None]
    make = {
        "default": lambda: SingleTaskGP(X, Y[:, :1]),
        "two outputs": lambda: SingleTaskGP(X, Y),
        "fixed noise": lambda: SingleTaskGP(X, Y[:, :1], noise),
        "multitask": lambda: Multitask(X, Y),
        "correlated noise": lambda: Multitask(X, Y, rank=1),
        "long format": lambda: MultiTaskGP(long_X, long_Y, task_feature=-1),
        "kronecker": lambda: KroneckerMultiTaskGP(X, Y),
        "batch": lambda: SingleTaskGP(
            torch.stack([X, X / 2]), torch.stack([Y, -Y])[..., :1]
        ),
    }
    return make[name]()


@quiet
@pytest.mark.parametrize("name", MODELS)
def test_upstreams_objective_times_the_number_of_targets_is_evidence_and_prior(name):
    model = build_exact(name)
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    model.train()
    prior = model(*model.train_inputs)
    per_target = mll(prior, model.train_targets, *model.train_inputs)
    model.eval()
    parts = evidence_parts(model)
    total = per_target * prior.event_shape.numel()
    torch.testing.assert_close(
        parts.value + parts.log_prior, total, rtol=1e-9, atol=0.0
    )
    assert parts.kind == "exact" and not model.training
    torch.testing.assert_close(parts.value, log_evidence(model))
    torch.testing.assert_close(parts.fit - parts.complexity, parts.value)
    assert (parts.log_prior != 0).all() == (
        name not in ("multitask", "correlated noise")
    )
    count = prior.event_shape.numel()
    assert parts.num_targets == count
    assert (parts.effective_dimension > 0).all()
    assert (parts.effective_dimension < count).all()


def test_fit_complexity_and_dimension_are_those_of_the_formula():
    X, Y = data()
    model = single(X, Y)
    K = kernel()(X).to_dense().detach()
    noise = NOISE * torch.eye(N).double()
    parts = evidence_parts(model)
    complexity, dimension = oracles.complexity_and_dimension(K, noise)
    value = oracles.log_density(Y[:, 0], torch.zeros(N).double(), K + noise)
    assert parts.value.item() == pytest.approx(value, rel=1e-9)
    assert parts.complexity.item() == pytest.approx(complexity, rel=1e-8)
    assert parts.effective_dimension.item() == pytest.approx(dimension, rel=1e-8)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_order_of_tasks_and_points_does_not_matter(interleaved, rank):
    X, Y = data(m=2)
    model = Multitask(X, Y, rank, interleaved)
    expected = Multitask(X, Y, rank, True)
    expected.load_state_dict(model.state_dict())
    for got, wanted in zip(
        evidence_parts(model), evidence_parts(expected), strict=True
    ):
        if isinstance(got, torch.Tensor):
            torch.testing.assert_close(got, wanted)
    marginal = gaussian_marginal(model)
    like = expected.likelihood(expected.train()(X))
    torch.testing.assert_close(marginal.covariance, like.covariance_matrix)
    rows = torch.tensor([5, 2])
    few = Multitask(X[rows], Y[rows], rank, interleaved)
    few.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        marginal.subset(rows).covariance, gaussian_marginal(few).covariance
    )
    torch.testing.assert_close(
        marginal.subset(rows).noise, gaussian_marginal(few).noise
    )


@quiet
def test_a_tangent_kernel_in_an_exact_gp_has_the_same_parts_as_the_linear_model():
    X, Y = data(d=3)
    net = Nested(1).double()
    linear = LinearizedGP(net, X, Y, likelihood(), offset=False)
    linear.prior_variance = 0.3
    tangent = NeuralTangentKernel(copy.deepcopy(net)).double()
    tangent.prior_variance = 0.3
    exact = single(X, Y, covar_module=tangent)
    for got, wanted in zip(evidence_parts(exact), evidence_parts(linear), strict=True):
        if isinstance(got, torch.Tensor):
            torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
        else:
            assert got == wanted


def test_labels_have_an_approximation():
    parts = evidence_parts(build("softmax"))
    assert parts.kind == "approximation"
    assert parts.value.item() == pytest.approx(build("softmax").log_evidence().item())


@pytest.mark.parametrize(
    "structure, kind", [(Diagonal(), "lower bound"), (Kronecker(), "approximation")]
)
def test_a_structured_curvature_is_a_bound_only_if_it_is_one(structure, kind):
    model = build("gaussian", inference=structure)
    parts = evidence_parts(model)
    assert parts.kind == kind
    assert parts.value.item() == pytest.approx(model.log_evidence().item())
    assert evidence_parts(build("softmax", inference=structure)).kind == "approximation"
    with pytest.raises(
        NotImplementedError, match=f"inference={type(structure).__name__}"
    ):
        gaussian_marginal(model)


@quiet
def test_beyond_the_size_where_upstream_draws_it_stays_exact():
    X, Y = data(40)
    model = single(X, Y)
    with max_cholesky_size(10):
        value = log_evidence(model)
    assert value.item() == log_evidence(model).item()


@quiet
def test_a_list_of_models_has_the_sum_without_a_division():
    X, Y = data(m=2)
    both = ModelListGP(single(X, Y[:, :1]), single(X[:9], Y[:9, 1:]))
    parts = [log_evidence(model).item() for model in both.models]
    assert log_evidence(both).item() == pytest.approx(sum(parts))


# -- bounds ---------------------------------------------------------------------------


def inducing(Z, X, K=None):
    K = kernel() if K is None else K
    return K(Z).to_dense().detach(), K(Z, X).to_dense().detach()


def optimal(Z, X, Y, strategy=VariationalStrategy):
    """A variational GP at the best distribution over its inducing values."""
    model = Sparse(Z, strategy)
    K_uu, K_uf = inducing(Z, X)
    mean, covariance = oracles.best_whitened(Y[:, 0], K_uu, K_uf, NOISE)
    if strategy is UnwhitenedVariationalStrategy:
        L = torch.linalg.cholesky(K_uu)
        mean, covariance = L @ mean, L @ covariance @ L.T
    q = model.variational_strategy._variational_distribution
    with torch.no_grad():
        q.variational_mean.copy_(mean)
        q.chol_variational_covar.copy_(torch.linalg.cholesky(covariance))
    model.variational_strategy.variational_params_initialized.fill_(1)
    return model


NO_JITTER = 1e-12


@pytest.mark.parametrize("m", [4, N])
def test_at_the_best_distribution_the_bound_is_the_collapsed_one(m):
    X, Y = data()
    with gpytorch.settings.variational_cholesky_jitter(double_value=NO_JITTER):
        parts = evidence_parts(optimal(X[:m], X, Y), X, Y, likelihood())
    K = kernel()(X).to_dense().detach()
    K_uu, K_uf = inducing(X[:m], X)
    expected = oracles.collapsed_bound(Y[:, 0], K, K_uu, K_uf, NOISE)
    exact = log_evidence(single(X, Y)).item()
    assert parts.kind == "lower bound"
    assert parts.value.item() == pytest.approx(expected, abs=1e-6)
    assert parts.value.item() < exact + 1e-6
    if m == N:
        assert parts.value.item() == pytest.approx(exact, abs=1e-6)
        _, wanted = oracles.complexity_and_dimension(K, NOISE * torch.eye(N).double())
        assert parts.effective_dimension.item() == pytest.approx(wanted, abs=1e-5)
    else:
        assert parts.value.item() < exact - 1


def test_no_distribution_exceeds_the_evidence_or_the_best_one():
    X, Y = data()
    best = log_evidence(optimal(X[:6], X, Y), X, Y, likelihood()).item()
    exact = log_evidence(single(X, Y)).item()
    generator = torch.Generator().manual_seed(0)
    for scale in (0.01, 0.1, 1.0):
        model = optimal(X[:6], X, Y)
        q = model.variational_strategy._variational_distribution
        step = torch.randn(6, generator=generator, dtype=torch.float64)
        q.variational_mean.data += scale * step
        assert log_evidence(model, X, Y, likelihood()).item() < best < exact


def test_whitening_changes_nothing():
    X, Y = data()
    with gpytorch.settings.variational_cholesky_jitter(double_value=NO_JITTER):
        got, wanted = (
            evidence_parts(optimal(X[:5], X, Y, kind), X, Y, likelihood())
            for kind in (UnwhitenedVariationalStrategy, VariationalStrategy)
        )
    for name, a, b in zip(got._fields, got, wanted, strict=True):
        if isinstance(a, torch.Tensor):
            # Upstream's unwhitened prior has a jitter of its own.
            rtol = 2e-3 if name == "effective_dimension" else 1e-6
            torch.testing.assert_close(a, b, rtol=rtol, atol=0.0)
        else:
            assert a == b


@quiet
@pytest.mark.parametrize("m", [1, 2])
def test_the_elbo_of_upstream_times_n_is_bound_and_prior(m):
    X, Y = data(m=m)
    model = SingleTaskVariationalGP(X, Y, inducing_points=X[:5])
    model.posterior(X)  # places the distribution over the inducing values
    parts = evidence_parts(model, X, Y)
    mll = VariationalELBO(model.likelihood, model.model, num_data=N)
    model.train()
    elbo = mll(model(X), Y.squeeze(-1))
    torch.testing.assert_close(parts.value + parts.log_prior, N * elbo.squeeze())
    assert parts.log_prior.item() != 0 and parts.num_targets == N * m
    torch.testing.assert_close(parts.value, log_evidence(model, X, Y))


def test_chunks_of_data_sum_up(monkeypatch):
    X, Y = data()
    model = optimal(X[:5], X, Y)
    whole = log_evidence(model, X, Y, likelihood())
    monkeypatch.setattr(bound_file, "_CHUNK", 4)
    torch.testing.assert_close(log_evidence(model, X, Y, likelihood()), whole)


@quiet
def test_inducing_points_inside_an_exact_gp_make_a_bound():
    X, Y = data()
    noise = likelihood()
    sparse = InducingPointKernel(kernel(), X[:4].clone(), noise)
    model = single(X, Y, covar_module=sparse, likelihood=noise)
    parts = evidence_parts(model)
    K = kernel()(X).to_dense().detach()
    K_uu, K_uf = inducing(X[:4], X)
    expected = oracles.collapsed_bound(Y[:, 0], K, K_uu, K_uf, NOISE)
    assert parts.kind == "lower bound"
    assert parts.value.item() == pytest.approx(expected, abs=1e-3)  # upstream's jitter
    assert parts.value < log_evidence(single(X, Y))


def test_a_point_estimate_of_inducing_values_is_no_bound():
    X, Y = data()
    model = Sparse(X[:5], q=DeltaVariationalDistribution)
    parts = evidence_parts(model, X, Y, likelihood())
    assert parts.kind == "approximation"
    assert parts.effective_dimension.item() == 5


def test_transforms_of_a_variational_gp_apply_and_learn_nothing():
    X, Y = data()
    shift, scale = float(Y.mean()), float(Y.std())
    with pytest.warns(UserInputWarning, match="Using an outcome transform"):
        made = SingleTaskVariationalGP(
            X,
            Y,
            inducing_points=X[:5],
            outcome_transform=Standardize(1),
        )
    made.posterior(X)
    state = copy.deepcopy(made.state_dict())
    few = log_evidence(made, X[:4], Y[:4])
    inner = log_evidence(made.model, X[:4], (Y[:4] - shift) / scale, made.likelihood)
    torch.testing.assert_close(few, inner)
    for name, value in made.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_a_bound_by_draws_is_an_estimate_with_its_error():
    X, _ = data()
    labels = torch.arange(N) % 3
    model = gpytorch.models.ApproximateGP(
        gpytorch.variational.IndependentMultitaskVariationalStrategy(
            Sparse(X[:4]).variational_strategy, num_tasks=3
        )
    )
    softmax = SoftmaxLikelihood(num_classes=3, mixing_weights=False).double()
    softmax.eval()
    log_evidence(model, X, labels, softmax)  # places the inducing values
    first = evidence_parts(model, X, labels, softmax)
    assert first.kind == "estimated lower bound" and not softmax.training
    torch.rand(1)  # moves the global state, not the estimate
    assert evidence_parts(model, X, labels, softmax).value.item() == first.value.item()
    others = torch.stack(
        [
            log_evidence(
                model, X, labels, softmax, generator=torch.Generator().manual_seed(i)
            )
            for i in range(1, 13)
        ]
    ).detach()
    # The error is itself estimated, from 8 rounds: a quarter of it is its own error.
    ratio = first.standard_error.item() / others.std().item()
    assert 0.4 < ratio < 2.0
    assert abs(first.value.item() - others.mean().item()) < 4 * others.std().item()
    latent = model.train()(X)
    f = torch.randn(100_000, N, 3, generator=torch.Generator().manual_seed(2)).double()
    f = latent.mean + latent.variance.sqrt() * f
    exact = f.log_softmax(-1)[:, torch.arange(N), labels].mean(0).sum().item()
    assert abs(others.mean().item() - exact + first.complexity.item()) < others.std()
    binary = evidence_parts(
        Sparse(X[:4]), X, (labels > 0).double(), BernoulliLikelihood()
    )
    assert binary.kind == "lower bound" and binary.standard_error == 0


@pytest.mark.parametrize("fresh", [True, False])
def test_the_global_random_state_stays(fresh):
    X, _ = data()
    labels = torch.arange(N) % 3
    strategy = Sparse(X[:4])
    model = gpytorch.models.ApproximateGP(
        gpytorch.variational.IndependentMultitaskVariationalStrategy(
            strategy.variational_strategy, num_tasks=3
        )
    )
    softmax = SoftmaxLikelihood(num_classes=3, mixing_weights=False).double()
    if not fresh:
        model.train()(X)
    before = torch.get_rng_state()
    first = log_evidence(model, X, labels, softmax)
    assert torch.equal(before, torch.get_rng_state())
    if not fresh:
        assert log_evidence(model, X, labels, softmax).item() == first.item()
    binary = log_evidence(
        Sparse(X[:4]), X, (labels > 0).double(), BernoulliLikelihood()
    )
    assert binary.isfinite() and torch.equal(before, torch.get_rng_state())


# -- bad input ------------------------------------------------------------------------


@quiet
def test_what_has_no_evidence_is_refused():
    X, Y = data()
    model, sparse = single(X, Y), Sparse(X[:4])
    for call in (log_evidence, evidence_parts):
        with pytest.raises(TypeError, match="variational GP.*but model is Linear"):
            call(torch.nn.Linear(1, 1))
        with pytest.raises(ValueError, match="SingleTaskGP keeps its training data"):
            call(model, X, Y)
        with pytest.raises(ValueError, match="Sparse was given without. Pass all"):
            call(sparse)
        with pytest.raises(ValueError, match="Sparse has no likelihood of its own"):
            call(sparse, X, Y)
    with pytest.raises(ShapeError, match="14"):
        log_evidence(sparse, X, Y[:3], likelihood())
    with pytest.raises(ShapeError, match="X must be ``n x d`` and Y"):
        log_evidence(sparse, X[None], Y[None], likelihood())
    with pytest.raises(TypeError, match="needs a gpbridge.LinearizedGP or a gpytorch"):
        gaussian_marginal(sparse)
    with pytest.raises(TypeError, match="SoftmaxLikelihood observes labels"):
        gaussian_marginal(build("softmax"))


def test_an_exact_gp_without_data_or_beyond_memory_is_refused(monkeypatch):
    X, Y = data(m=2)
    model = Multitask(X, Y)
    monkeypatch.setattr("gpbridge.selection.gaussian_marginal.MEMORY_BUDGET", 1000)
    with pytest.raises(MemoryError, match="exact evidence of 28 targets needs about"):
        log_evidence(model)
    model.train_inputs = None
    with pytest.raises(ValueError, match="Multitask has no training data"):
        log_evidence(model)
