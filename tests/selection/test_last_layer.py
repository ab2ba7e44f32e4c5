"""Alternating phases: what moves when, a toy of known invariance, resumed, doors."""

import copy
import inspect
import pickle

import pytest
import torch
from botorch.models import SingleTaskGP
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.mlls import VariationalELBO
from torch import nn

from gpbridge.augmentation import Rotation2d
from gpbridge.dnn.divergence import DivergedError
from gpbridge.dnn.elbo_training import ELBOFit
from gpbridge.inducing_gp import SparseGP
from gpbridge.kernels import DeepKernel, InvariantKernel
from gpbridge.selection import (
    OrbitVariationalELBO,
    learn_last_layer_invariance,
    log_evidence,
)
from gpbridge.storage import load_state, save_state
from gpbridge.testing import assert_module_unchanged

pytestmark = pytest.mark.filterwarnings(
    "ignore::botorch.exceptions.warnings.InputDataWarning"
)

DOUBLE = torch.float64
QUIET = {"progress": False}


class Body(nn.Module):
    """Features from layers in modules."""

    def __init__(self, width=8, norm=False):
        super().__init__()
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.parts = nn.ModuleDict({"first": nn.Linear(2, width)})
        self.last = nn.Linear(width, 4)

    def forward(self, x):
        return self.last(self.norm(self.parts["first"](x)).tanh()).tanh()


def body(seed=0, norm=False):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Body(norm=norm).double()


def points(n=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(n, 2, generator=generator, dtype=DOUBLE) - 1


def radial(X):
    return torch.sin(3 * X.norm(dim=-1))


def angular(X):
    return (3 * torch.atan2(X[:, 1], X[:, 0])).sin()


def kernel(X, law=None, norm=False, **options):
    deep = DeepKernel(body(norm=norm), RBFKernel(), **options)
    return ScaleKernel(InvariantKernel(deep, law or Rotation2d(4, init=0.4))).to(X)


def exact(X, y, **options):
    Y = y[:, None]
    return SingleTaskGP(X, Y, covar_module=kernel(X, **options), outcome_transform=None)


def sparse(X, norm=False, **options):
    return SparseGP(kernel(X, norm=norm), X[:6].clone(), **options).to(X)


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


def trace(kept):
    """What moved between epochs: hyperparameters, weights, inference."""
    found = []
    for before, after in zip(kept, kept[1:], strict=False):
        moved = {name for name, p in after.items() if not p.equal(before[name])}
        weights = {name for name in moved if ".network." in name}
        inference = {n for n in moved if n.startswith("variational_strategy")}
        others = moved - weights - inference
        found.append((bool(others), bool(weights), bool(inference)))
    return found


def keep_in(kept):
    def keep(epoch, module, entry):
        gp = getattr(module, "model", module)
        kept.append({n: p.detach().clone() for n, p in gp.named_parameters()})

    return keep


def expected_trace(phases, sparse):
    return [(turn == "hyperparameters", turn == "weights", sparse) for turn in phases]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("build", [exact, sparse])
def test_each_phase_moves_its_own_parameters(build, norm):
    """Also where a last batch has one row, which batch norm would be spared."""
    X = points(11)
    model = exact(X, radial(X), norm=norm) if build is exact else sparse(X, norm=norm)
    data = None if build is exact else (X, radial(X))
    kept = []
    fit = run(model, data, callback=keep_in(kept), batch_size=5)
    assert fit.phases == 2 * (3 * ("hyperparameters",) + 2 * ("weights",))
    assert trace(kept) == expected_trace(fit.phases[1:], build is sparse)
    law = "covar_module.base_kernel.augmentation.raw_bound"
    assert not torch.equal(kept[2][law], kept[0][law])
    assert all(p.requires_grad for p in fit.model.parameters())


def test_phases_stay_those_of_epochs_when_the_batches_change():
    X = points(12)
    data, kept = (X, radial(X)), []
    half = run(sparse(X), data, cycles=1, batch_size=12)
    options = {"batch_size": 4, "callback": keep_in(kept), "resume": half.state}
    fit = run(sparse(X), data, **options)
    assert fit.phases == 3 * half.phases
    assert trace(kept) == expected_trace(fit.phases[6:], True)


@pytest.mark.parametrize("name", ["hyper_epochs", "weight_epochs"])
def test_a_run_goes_on_with_its_own_lengths_only(name):
    X = points(8)
    model = exact(X, radial(X))
    half = run(model, cycles=1)
    with pytest.raises(
        ValueError, match=f"another run: its {name} is ., and now it is 6"
    ):
        run(model, cycles=1, resume=half.state, **{name: 6})


def test_no_gradient_of_weights_is_computed_while_they_are_held():
    X = points(8)
    seen = []

    def look(module, inputs, outputs):
        seen[-1] |= {p.requires_grad for p in module.parameters()}

    def begin(epoch, module, entry):
        if not seen:
            for part in module.modules():
                if isinstance(part, Body):
                    part.register_forward_hook(look)
        seen.append(set())

    run(exact(X, radial(X)), callback=begin)
    cycle = 3 * [{False}] + 2 * [{True}]
    assert seen[:-1] == (2 * cycle)[1:]


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
    assert second.misfit == whole.misfit


def test_the_result_is_the_evidence_of_the_model_and_can_be_copied():
    X = points(12)
    fit = run(exact(X, radial(X)))
    assert not fit.model.training
    assert fit.evidence == float(log_evidence(fit.model).detach())
    C = fit.model.covar_module(X).to_dense().detach()
    C = C + fit.model.likelihood.noise.detach() * torch.eye(12, dtype=DOUBLE)
    misfit = radial(X) - fit.model.mean_module.constant.detach()
    assert abs(fit.misfit - float(misfit @ torch.linalg.solve(C, misfit)) / 12) < 1e-8
    assert abs(fit.log_det - float(torch.linalg.slogdet(C)[1]) / 12) < 1e-8
    for twin in (copy.deepcopy(fit), pickle.loads(pickle.dumps(fit))):
        assert torch.equal(twin.learnt["bound"], fit.learnt["bound"])


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
    X = points(12)
    model = exact(X, radial(X))
    low = model.likelihood.noise_covar.raw_noise_constraint.lower_bound.item()
    kept = []

    def keep(epoch, module, entry):
        kept.append(module.likelihood.noise.item())

    # So large a noise is best left at once.
    model.likelihood.noise_covar.raw_noise.data.fill_(5.0)
    run(model, learning_rate=5.0, cycles=1, callback=keep)
    assert min(kept) == kept[0] == pytest.approx(low)


@pytest.mark.parametrize(
    "spoiled, done", [("raw_outputscale", 1), ("base_kernel.augmentation.raw_bound", 4)]
)
def test_a_run_that_diverges_says_so_and_goes_on_from_its_last_good_state(
    spoiled, done
):
    X = points(8)
    model = exact(X, radial(X))

    def spoil(epoch, module, entry):
        if epoch == done - 1:
            module.covar_module.get_parameter(spoiled).data.fill_(torch.nan)

    options = {"learning_rate": 0.03, "network_learning_rate": 0.004}
    with pytest.raises(DivergedError, match=f"after {done} of 10 epochs") as caught:
        run(model, callback=spoil, **options)
    message = str(caught.value)
    # No rate above what was tried or usual, and one for each of the two.
    assert "with learning_rate=0.003 (it is 0.03)" in message
    assert "try network_learning_rate=0.0004 (it is 0.004)" in message
    good = caught.value.last_good
    assert isinstance(good, ELBOFit)
    assert all(p.requires_grad for p in good.model.parameters())
    # Five more epochs, as if nothing had happened.
    whole, phases = run(model, **options), run(model, cycles=1).phases
    rest = run(model, cycles=1, resume=good.state, **options)
    assert rest.history["elbo"] == whole.history["elbo"][: done + 5]
    assert rest.phases == (2 * phases)[: done + 5]


def test_the_usual_rates_are_the_defaults():
    X = points(8)

    def spoil(epoch, module, entry):
        module.covar_module.raw_outputscale.data.fill_(torch.nan)

    options = {"learning_rate": 10.0, "network_learning_rate": 10.0}
    with pytest.raises(DivergedError) as caught:
        run(exact(X, radial(X)), callback=spoil, **options)
    defaults = inspect.signature(learn_last_layer_invariance).parameters
    for name in options:
        assert f" {name}={defaults[name].default:g} (it is 10)" in str(caught.value)


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
