"""Effective dimension of each prior group, against posterior covariances."""

import pytest
import torch
from botorch.models import SingleTaskGP

from gpbridge.linearized import Diagonal
from gpbridge.selection import group_dimensions
from gpbridge.testing import assert_module_unchanged
from tests import oracles_linearized, oracles_selection
from tests.linearized.problems import both_spaces, build, inputs, network, targets

VARIANCES = (0.3, 2.0)


def ready(name="gaussian", space="auto", **options):
    X = inputs(12)
    model = build(name, space, X, targets(name, X), groups="layer", **options)
    model.prior_variance = torch.tensor(VARIANCES, dtype=torch.float64)
    return model


@both_spaces
def test_it_is_the_number_of_weights_minus_what_the_posterior_leaves_of_the_prior(
    space,
):
    model = ready(space=space)
    groups = model.covar_module.groups
    sizes = [
        sum(model.functional.params[name].numel() for name in group) for group in groups
    ]
    train = oracles_linearized.tangent(network(), inputs(12))
    expected = oracles_selection.dimensions_of_groups(
        train.J, sizes, VARIANCES, float(model.noise_variance)
    )
    torch.testing.assert_close(group_dimensions(model), expected)


@pytest.mark.parametrize("name", ["gaussian", "multitask", "softmax", "logistic"])
def test_the_sum_is_the_effective_dimension_of_the_evidence(name):
    model = ready(name)
    total = model.evidence().effective_dimension
    torch.testing.assert_close(group_dimensions(model).sum(), total)


def test_a_structure_has_dimensions_too():
    model = ready(inference=Diagonal())
    found = group_dimensions(model)
    total = model.evidence().effective_dimension.to(found)
    torch.testing.assert_close(found.sum(), total, rtol=1e-12, atol=0)


def test_one_group_has_all_of_it_also_from_a_spectrum():
    X = inputs(12)
    model = build("gaussian", "auto", X, targets("gaussian", X))
    first = group_dimensions(model)
    for _ in range(3):  # from the third evaluation on, a spectrum serves
        model.evidence()
    torch.testing.assert_close(group_dimensions(model), first)
    assert first.shape == (1,)


def test_a_group_that_is_switched_off_has_no_dimensions():
    model = ready()
    model.prior_variance = torch.tensor([1.0, 1e-9], dtype=torch.float64)
    on, off = group_dimensions(model).tolist()
    assert 0 <= off < 1e-6 < 1 < on


def test_the_model_stays_as_it_is():
    model = ready()
    raw = model.covar_module.raw_prior_variance.requires_grad_(False)
    before = raw.clone()
    with assert_module_unchanged(model.functional), torch.no_grad():
        assert group_dimensions(model).requires_grad is False
    assert not raw.requires_grad and raw.grad is None
    assert torch.equal(raw, before)


def test_another_model_is_refused_by_name():
    X = inputs(5)
    with pytest.raises(TypeError, match="needs a gpbridge.LinearizedGP.*SingleTaskGP"):
        group_dimensions(SingleTaskGP(X, X.sum(-1, keepdim=True)))
