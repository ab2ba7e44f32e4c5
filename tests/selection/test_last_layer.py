"""Alternating phases: what moves when, a toy of known invariance, resumed, doors."""

import copy
import math
import pickle

import pytest
import torch
from botorch.models import SingleTaskGP
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.mlls import VariationalELBO
from torch import nn

from gpbridge.augmentation import Rotation2d
from gpbridge.checks import ReliabilityWarning
from gpbridge.dnn.divergence import DivergedError
from gpbridge.inducing_gp import SparseGP
from gpbridge.kernels import DeepKernel, InvariantKernel
from gpbridge.selection import (
    OrbitVariationalELBO,
    learn_last_layer_invariance,
    log_evidence,
)
from gpbridge.selection.last_layer import _Toggling, _warn_if_exploited
from gpbridge.storage import load_state, save_state
from gpbridge.testing import assert_module_unchanged

pytestmark = pytest.mark.filterwarnings(
    "ignore::botorch.exceptions.warnings.InputDataWarning"
)

DOUBLE = torch.float64
QUIET = {"progress": False}


class Body(nn.Module):
    """Features from layers in modules."""

    def __init__(self, width=8):
        super().__init__()
        self.parts = nn.ModuleDict({"first": nn.Linear(2, width)})
        self.last = nn.Linear(width, 4)

    def forward(self, x):
        return self.last(self.parts["first"](x).tanh()).tanh()


def body(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Body().double()


def points(n=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(n, 2, generator=generator, dtype=DOUBLE) - 1


def radial(X):
    return torch.sin(3 * X.norm(dim=-1))


def angular(X):
    return (3 * torch.atan2(X[:, 1], X[:, 0])).sin()


def kernel(X, law=None, **options):
    deep = DeepKernel(body(), RBFKernel(), **options)
    return ScaleKernel(InvariantKernel(deep, law or Rotation2d(4, init=0.4))).to(X)


def exact(X, y, **options):
    Y = y[:, None]
    return SingleTaskGP(X, Y, covar_module=kernel(X, **options), outcome_transform=None)


def sparse(X, **options):
    return SparseGP(kernel(X), X[:6].clone(), **options).to(X)


def run(model, data=None, **options):
    options = {"cycles": 2, "hyper_epochs": 3, "weight_epochs": 2} | QUIET | options
    return learn_last_layer_invariance(model, data, **options)


def test_the_law_widens_for_radial_targets_and_narrows_for_angular_ones():
    """From 0.4; an average over a third of a turn would leave nothing of the second."""
    X = points()
    found = {}
    for target in (radial, angular):
        options = {"hyper_epochs": 15, "weight_epochs": 3, "learning_rate": 0.1}
        fit = run(exact(X, target(X)), **options)
        found[target] = fit.learnt["bound"].item()
        assert fit.history["elbo"][-1] > fit.history["elbo"][0]
    assert found[radial] > 0.6 > 0.4 > found[angular]


@pytest.mark.parametrize("build", [exact, sparse])
def test_each_phase_moves_its_own_parameters(build):
    X = points(12)
    model = exact(X, radial(X)) if build is exact else sparse(X)
    data = None if build is exact else (X, radial(X))
    kept = []

    def keep(epoch, module, entry):
        gp = module if build is exact else module.model
        kept.append({n: p.detach().clone() for n, p in gp.named_parameters()})

    fit = run(model, data, callback=keep, batch_size=5)
    assert fit.phases == 2 * (3 * ("hyperparameters",) + 2 * ("weights",))
    for epoch in range(1, len(kept)):
        moved = {n for n, p in kept[epoch].items() if not p.equal(kept[epoch - 1][n])}
        weights = {n for n in moved if ".network." in n}
        inference = {n for n in moved if n.startswith("variational_strategy")}
        others = moved - weights - inference
        turn = fit.phases[epoch]
        assert bool(weights) == (turn == "weights")
        assert bool(others) == (turn == "hyperparameters")
        assert bool(inference) == (build is sparse)
    law = "covar_module.base_kernel.augmentation.raw_bound"
    assert not torch.equal(kept[2][law], kept[0][law])


@pytest.mark.parametrize("kind", ["exact", "sparse", "orbit"])
def test_a_resumed_run_has_the_same_bits_and_the_model_stays(kind, tmp_path):
    X = points(12)
    model, data = exact(X, radial(X)), None
    if kind != "exact":
        data = X, radial(X)
        model = sparse(X)
        bound = VariationalELBO if kind == "sparse" else OrbitVariationalELBO
        model = bound(model.likelihood, model, 12)
    options = {"batch_size": 5}
    with assert_module_unchanged(model):
        whole = run(model, data, **options)
        half = run(model, data, cycles=1, **options)
        save_state(half.state, tmp_path / "state.pt")
        state = load_state(tmp_path / "state.pt")
        second = run(model, data, cycles=1, resume=state, **options)
    assert second.history == whole.history and second.phases == whole.phases
    assert second.evidence == whole.evidence and second.log_det == whole.log_det
    found = second.model.state_dict()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(found[name], value), name


def test_the_result_is_the_evidence_of_the_model_and_can_be_copied():
    X = points(12)
    fit = run(exact(X, radial(X)))
    assert not fit.model.training
    assert fit.evidence == float(log_evidence(fit.model).detach())
    C = fit.model.covar_module(X).to_dense().detach()
    C = C + fit.model.likelihood.noise.detach() * torch.eye(12, dtype=DOUBLE)
    misfit = radial(X) - fit.model.mean_module.constant.detach()
    assert abs(fit.misfit - float(misfit @ torch.linalg.solve(C, misfit)) / 12) < 1e-8
    assert abs(fit.log_det[1] - float(torch.linalg.slogdet(C)[1]) / 12) < 1e-8
    for twin in (copy.deepcopy(fit), pickle.loads(pickle.dumps(fit))):
        assert torch.equal(twin.learnt["bound"], fit.learnt["bound"])


def test_weights_that_collapse_the_log_determinant_are_reported():
    with pytest.warns(ReliabilityWarning, match="lowered the log determinant by 1.5"):
        _warn_if_exploited(1.0, 0.5, -1.0)
    _warn_if_exploited(1.0, 0.5, 0.0)
    _warn_if_exploited(2.0, 0.5, -1.0)


def test_the_global_random_state_stays_and_the_seed_decides():
    X = points(12)
    state = torch.get_rng_state()
    found = [
        run(
            sparse(X),
            (X, radial(X)),
            cycles=1,
            batch_size=5,
            generator=torch.Generator().manual_seed(seed),
        ).evidence
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1] != found[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_parameter_without_a_transform_stays_inside_its_bounds():
    """As BoTorch's noise, which a step of Adam would make negative."""
    noise, weight = (nn.Parameter(torch.tensor(0.1, dtype=DOUBLE)) for _ in range(2))
    bounds = {noise: [torch.tensor(end, dtype=DOUBLE) for end in (0.05, math.inf)]}
    optimizer = _Toggling(([noise], [weight], []), (1, 1), 1.0, 1.0, bounds)
    for parameter in (noise, weight):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert noise.item() == 0.05 and weight.item() == 0.1
    optimizer.step()
    assert noise.item() == 0.05 and weight.item() < 0


def test_a_run_that_diverges_says_so():
    X = points(8)

    def spoil(epoch, module, entry):
        module.covar_module.raw_outputscale.data.fill_(torch.nan)

    with pytest.raises(DivergedError, match="after 1 of 10 epochs"):
        run(exact(X, radial(X)), callback=spoil)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"cycles": 0}, ValueError, "cycles must be a whole number"),
        ({"hyper_epochs": 0}, ValueError, "hyper_epochs must be a whole number"),
        ({"weight_epochs": 0}, ValueError, "weight_epochs must be a whole number"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate must be positive"),
        ({"network_learning_rate": 0.0}, ValueError, "network_learning_rate must"),
        ({"data": (1, 2)}, TypeError, "data are for a sparse GP"),
        ({"resume": {}}, ValueError, "resume must be the state"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    X = points(6)
    with pytest.raises(error, match=message):
        run(exact(X, radial(X)), options.pop("data", None), **options)


def test_bad_models_are_refused():
    X = points(8)
    y = radial(X)
    with pytest.raises(ValueError, match="no network to train"):
        run(exact(X, y, freeze=True))
    with pytest.raises(TypeError, match="distribution='cholesky'"):
        run(sparse(X, distribution="natural"), (X, y))
    plain = SingleTaskGP(X, y[:, None], outcome_transform=None)
    with pytest.raises(ValueError, match="averages over no orbits"):
        run(plain)
