"""What fits of sparse GPs refuse: options, labels, shapes, states, dtypes."""

import copy

import pytest
import torch
from botorch.exceptions.errors import InputDataError
from gpytorch.kernels import RBFKernel
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    GaussianLikelihood,
    SoftmaxLikelihood,
)
from gpytorch.mlls import VariationalELBO

from gpbridge.augmentation import Rotation2d
from gpbridge.checks import ShapeError
from gpbridge.inducing_gp import SparseGP
from gpbridge.kernels import InvariantKernel
from gpbridge.likelihoods import LogisticLikelihood
from gpbridge.polya_gamma import PolyaGammaBernoulliLikelihood
from gpbridge.selection import OrbitVariationalELBO, fit_sparse_gp
from tests.selection.sparse_problems import (
    DOUBLE,
    bound,
    model_for,
    of_outputs,
    regression,
)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"num_data": 9}, ValueError, "num_data=9, but there are 24 rows"),
        ({"epochs": 0}, ValueError, "epochs must be a whole number"),
        ({"batch_size": 0}, ValueError, "batch_size must be a whole number"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate must be positive"),
        ({"natural_rate": 0.0}, ValueError, "natural_rate must be positive"),
        ({"y": torch.zeros(3)}, ShapeError, "train_Y has 3"),
        ({"y": torch.full((24,), torch.nan)}, InputDataError, "train_Y contains NaN"),
        ({"resume": {}}, ValueError, "resume must be the state"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    X, y = regression()
    model = model_for(X)
    number = change.pop("num_data", len(X))
    elbo = VariationalELBO(model.likelihood, model, num_data=number)
    with pytest.raises(error, match=message):
        fit_sparse_gp(elbo, X, change.pop("y", y), **change)


@pytest.mark.parametrize(
    "likelihood, label, message",
    [
        (LogisticLikelihood(), 2.0, "must hold 0 and 1.*contains 2"),
        (BernoulliLikelihood(), 2.0, "must hold 0 and 1.*contains 2"),
        (PolyaGammaBernoulliLikelihood(), -1.0, "must hold 0 and 1.*contains -1"),
        (
            SoftmaxLikelihood(num_classes=3, mixing_weights=False),
            3,
            "lie in 0 .. 2",
        ),
    ],
)
def test_labels_are_checked_once_for_all_rows(likelihood, label, message, monkeypatch):
    """At the door, on any device: the bound itself looks at no values there."""
    X, _ = regression()
    y = torch.zeros(len(X), dtype=torch.tensor(label).dtype)
    y[17] = label
    outputs = 3 if isinstance(likelihood, SoftmaxLikelihood) else 1
    Z = X[:5].clone()
    model = SparseGP(RBFKernel(), Z, likelihood, num_outputs=outputs).double()
    elbo = bound(model, X)
    monkeypatch.setattr(elbo, "forward", None)  # no step is taken
    with pytest.raises(InputDataError, match=message):
        fit_sparse_gp(elbo, X, y, progress=False)


@pytest.mark.parametrize("change", ["data", "points", "bound"])
def test_a_state_of_another_run_is_refused(change):
    X, y = regression()
    kernel = InvariantKernel(RBFKernel(), Rotation2d(4))

    def start(X, points=8, elements=3):
        model = model_for(X, copy.deepcopy(kernel), points)
        return OrbitVariationalELBO(model.likelihood, model, len(X), elements)

    state = fit_sparse_gp(start(X), X, y, epochs=1, progress=False).state
    elbo, message = start(X), "its data is"
    if change == "data":
        y = -y
    elif change == "points":
        elbo, message = start(X, points=7), r"its model is .*\(8, 2\)"
    else:
        elbo, message = start(X, elements=4), "its model is .*num_orbit_samples.*3"
    with pytest.raises(ValueError, match=f"state is of another run: {message}"):
        fit_sparse_gp(elbo, X, y, epochs=1, resume=state, progress=False)


@pytest.mark.parametrize("num_elements", [None, 3])
@pytest.mark.parametrize(
    "outputs, shape, message",
    [
        (2, (6, 1), r"``6 x 2`` for Multi.*shape \(6, 1\).*one column.*leave num_out"),
        (2, (6,), r"``6 x 2`` for Multi.*shape \(6,\)"),
        (2, (6, 3), r"``6 x 2`` for Multi.*shape \(6, 3\). Pass one column"),
        (6, (6,), r"``6 x 6`` for Multi.*shape \(6,\)"),
        (1, (6, 2), r"``6``, one target for each row.*\(6, 2\).*num_outputs=2"),
        (1, (6, 1, 1), r"``6``, one target for each row.*shape \(6, 1, 1\)"),
    ],
)
def test_targets_do_not_broadcast(outputs, shape, message, num_elements):
    X, _ = regression(6)
    elbo = of_outputs(X, outputs, num_elements)
    Y = torch.zeros(shape, dtype=DOUBLE)
    with pytest.raises(ShapeError, match=message):
        fit_sparse_gp(elbo, X, Y, epochs=1, progress=False)
    if num_elements is not None:
        with pytest.raises(ShapeError, match=message):
            elbo(X, Y)


def test_one_hot_rows_are_no_labels():
    X, _ = regression(6)
    softmax = SoftmaxLikelihood(num_classes=2, mixing_weights=False)
    model = SparseGP(RBFKernel(), X[:3].clone(), softmax, num_outputs=2).double()
    with pytest.raises(ShapeError, match="``6`` class labels.*argmax"):
        fit_sparse_gp(bound(model, X), X, torch.ones(6, 2).long(), progress=False)


@pytest.mark.parametrize("num_elements", [None, 3])
@pytest.mark.parametrize("labels", [False, True])
def test_a_column_of_targets_is_the_vector(labels, num_elements):
    X, y = regression()
    y = (y > 0).to(y) if labels else y
    histories = []
    for targets in (y, y[:, None]):
        kernel = InvariantKernel(RBFKernel(), Rotation2d(4))
        likelihood = LogisticLikelihood() if labels else GaussianLikelihood()
        model = SparseGP(kernel, X[:5].clone(), likelihood).double()
        elbo = bound(model, X)
        if num_elements is not None:
            elbo = OrbitVariationalELBO(likelihood, model, len(X), num_elements)
        fit = fit_sparse_gp(elbo, X, targets, epochs=2, progress=False)
        histories.append(fit.history)
    assert histories[0] == histories[1]


def test_a_model_in_place_of_its_bound_is_refused():
    X, y = regression(6)
    message = (
        r"be a bound.*is SparseGP. Try fit_sparse_gp\(VariationalELBO\(.*num_data=6"
    )
    with pytest.raises(TypeError, match=message):
        fit_sparse_gp(model_for(X, num_inducing=3), X, y, progress=False)


@pytest.mark.parametrize("num_elements", [None, 3])
def test_inputs_of_another_dtype_are_refused(num_elements):
    X, y = regression(6)
    elbo = of_outputs(X, 1, num_elements)
    with pytest.raises(TypeError, match="x must be torch.float64 as the inducing"):
        fit_sparse_gp(elbo, X.float(), y.float(), epochs=1, progress=False)
