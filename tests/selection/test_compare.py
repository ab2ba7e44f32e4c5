"""The table of models: what it says, what it refuses to say."""

import math
import pickle

import pytest
import torch
from botorch.exceptions.warnings import UserInputWarning
from botorch.models import KroneckerMultiTaskGP, SingleTaskGP, SingleTaskVariationalGP
from botorch.models.transforms import Log, Standardize
from gpytorch.likelihoods import BernoulliLikelihood, GaussianLikelihood
from gpytorch.models import ExactGP
from torch import nn

from gpbridge import LinearizedGP
from gpbridge.likelihoods import LogisticLikelihood
from gpbridge.selection import (
    compare,
    evidence_parts,
    fit_evidence,
    held_out_log_density,
    leave_one_out,
    log_evidence,
)
from tests.linearized.problems import build, inputs, network, targets
from tests.selection.test_marginal_likelihood import (
    N,
    Sparse,
    data,
    likelihood,
    optimal,
    quiet,
    single,
)
from tests.selection.test_scan import cubic


class Polynomial(nn.Module):
    """A linear model of the powers up to an order."""

    def __init__(self, order):
        super().__init__()
        self.head = nn.ModuleDict({"out": nn.Linear(order, 1).double()})

    def forward(self, x):
        order = self.head["out"].in_features
        return self.head["out"](torch.cat([x**k for k in range(1, order + 1)], -1))


def polynomials(orders, X, Y):
    models = {}
    for order in orders:
        models[str(order)] = LinearizedGP(Polynomial(order), X, Y, offset=False)
        fit_evidence(models[str(order)], warn=False)
    return models


def test_evidence_selects_the_order_of_the_true_polynomial():
    X, Y = cubic(60)
    table = compare(polynomials((2, 3, 4, 6), X, Y))
    numbers = table.to_dict()
    assert table.best == "3"
    assert numbers["3"]["evidence"] > numbers["2"]["evidence"] + 10
    # Beyond the truth the fit hardly rises and the complexity does.
    assert numbers["6"]["complexity"] > numbers["3"]["complexity"] + 1
    assert numbers["6"]["effective_dimension"] > numbers["3"]["effective_dimension"]
    assert sum(row.weight for row in table.rows) == pytest.approx(1)
    assert numbers["3"]["held_out"] > numbers["2"]["held_out"]


@quiet
def test_rows_hold_what_each_function_says_of_the_model():
    X, Y = data()
    models = {"a": single(X, Y), "b": SingleTaskGP(X, Y, outcome_transform=None)}
    table = compare(models)
    values = [log_evidence(m).item() for m in models.values()]
    weights = torch.tensor(values).double().softmax(0)
    for (name, model), weight in zip(models.items(), weights, strict=True):
        row, parts = table.to_dict()[name], evidence_parts(model)
        assert row["evidence"] == pytest.approx(parts.value.item())
        assert row["fit"] == pytest.approx(parts.fit.item())
        assert row["complexity"] == pytest.approx(parts.complexity.item())
        assert row["log_prior"] == pytest.approx(parts.log_prior.item())
        dimension = parts.effective_dimension.item()
        assert row["effective_dimension"] == pytest.approx(dimension)
        assert row["kind"] == "exact" and row["likelihood"] == "GaussianLikelihood"
        assert row["weight"] == pytest.approx(weight.item())
        left_out = leave_one_out(model).value.item() / N
        assert row["held_out"] == pytest.approx(left_out)
    order = [row.evidence for row in table.rows]
    assert order == pytest.approx(sorted(values, reverse=True))
    assert table.num_targets == N and table.notes == ()
    again = compare(dict(reversed(models.items())))
    assert again.rows == table.rows
    assert pickle.loads(pickle.dumps(table)).rows == table.rows


@quiet
def test_the_table_prints_a_line_for_each_model():
    X, Y = data()
    text = str(compare({"plain": single(X, Y)})).splitlines()
    assert text[0].split()[:3] == ["model", "log", "evidence"]
    assert "held out (leave-one-out)" in text[0]
    assert text[1].startswith("plain") and "1.000" in text[1] and "exact" in text[1]
    nothing = str(compare({"plain": single(X, Y)}, held_out=None))
    assert nothing.splitlines()[1].endswith("-") and "(none)" in nothing


@quiet
@pytest.mark.parametrize("m", [1, 2])
def test_standardised_targets_stand_beside_raw_ones(m):
    X, Y = data(m=m)
    Y = 5 + 20 * Y
    raw = SingleTaskGP(X, Y, outcome_transform=None)
    scaled = SingleTaskGP(X, Y)
    # The same model in other units.
    transform = Standardize(m)
    inner = transform(Y)[0]
    std, mean = transform.stdvs[0], transform.means[0]
    inside = SingleTaskGP(X, inner, outcome_transform=None)
    table = compare({"raw": raw, "scaled": scaled}, held_out=(X[:4], Y[:4])).to_dict()
    expected = log_evidence(inside).sum() - N * std.log().sum()
    assert table["scaled"]["evidence"] == pytest.approx(expected.item())
    assert table["raw"]["evidence"] == pytest.approx(log_evidence(raw).sum().item())
    left_out = compare({"scaled": scaled}).to_dict()["scaled"]["held_out"]
    expected = leave_one_out(inside).value.sum() / N - std.log().sum()
    assert left_out == pytest.approx(expected.item())
    found = held_out_log_density(inside, X[:4], (Y[:4] - mean) / std)
    expected = (found - std.log().sum()).mean().item()
    assert table["scaled"]["held_out"] == pytest.approx(expected)


@quiet
def test_a_transform_that_is_not_linear_counts_its_slope_at_each_target():
    X, Y = data()
    Y = Y.exp()
    logs = SingleTaskGP(X, Y, outcome_transform=Log())
    inside = log_evidence(SingleTaskGP(X, Y.log(), outcome_transform=None))
    table = compare({"log": logs, "raw": SingleTaskGP(X, Y)}).to_dict()
    expected = inside.item() - Y.log().sum().item()  # d log y / dy = 1 / y
    assert table["log"]["evidence"] == pytest.approx(expected)


@quiet
def test_a_bound_stands_beside_the_evidence_with_a_note():
    X, Y = data()
    sparse, noise = optimal(X[:6], X, Y), likelihood()
    with pytest.warns(UserWarning, match="not exact for 'sparse' .lower bound."):
        table = compare({"exact": single(X, Y), "sparse": (sparse, noise)}, (X, Y))
    numbers = table.to_dict()
    assert numbers["sparse"]["evidence"] < numbers["exact"]["evidence"]
    assert numbers["sparse"]["kind"] == "lower bound"
    assert numbers["sparse"]["held_out"] is None  # no closed form
    assert "note: The evidence is not exact" in str(table) and len(table.notes) == 1
    scored = held_out_log_density(sparse, X[:3], Y[:3], noise).mean().item()
    table = compare({"sparse": (sparse, noise)}, (X, Y), held_out=(X[:3], Y[:3]))
    assert table.to_dict()["sparse"]["held_out"] == pytest.approx(scored)


@quiet
def test_a_variational_model_of_botorch_standardises_like_the_others():
    X, Y = data()
    Y = 3 + 10 * Y
    with pytest.warns(UserInputWarning, match="Using an outcome transform"):
        sparse = SingleTaskVariationalGP(
            X, Y, inducing_points=X[:5], outcome_transform=Standardize(1)
        )
    with pytest.warns(UserWarning, match="not exact for 'sparse'"):
        table = compare({"exact": SingleTaskGP(X, Y), "sparse": sparse}, (X, Y))
    std = Y.std().item()
    expected = log_evidence(sparse, X, Y).item() - N * math.log(std)
    assert table.to_dict()["sparse"]["evidence"] == pytest.approx(expected)


@quiet
def test_linearised_networks_and_gps_of_two_outputs_stand_together():
    X, Y = data(m=2)
    models = {
        "gp": SingleTaskGP(X, Y),
        "tasks": KroneckerMultiTaskGP(X, Y),
        "network": LinearizedGP(network(2), X, Y),
    }
    table = compare(models)
    assert table.num_targets == 2 * N and len(table.rows) == 3
    assert table.notes == ()


# -- refusals -------------------------------------------------------------------------


@quiet
def test_incomparable_models_are_named_with_the_reason():
    X, Y = data()
    base = {"first": single(X, Y)}
    pair = "'first' and 'second' cannot be compared: "

    def refused(model, match, **options):
        with pytest.raises(ValueError, match=pair + match):
            compare({**base, "second": model}, **options)

    refused(single(X[:9], Y[:9]), "they have 14 and 9 targets")
    refused(
        single(X, 10 * Y + 3),
        r"the targets of the second are 10 times .* plus 3, .* by -32.24 nats",
    )
    refused(single(X, Y.flip(0)), "they have the same targets in another order")
    refused(single(X, Y**2), "their targets differ, by up to")
    refused(single(X, 0 * Y), "their targets differ, by up to")
    labels = (Y > 0).double()
    classifier = SingleTaskVariationalGP(
        X, likelihood=BernoulliLikelihood(), inducing_points=X[:4]
    )
    with pytest.raises(ValueError, match="GaussianLikelihood and BernoulliLikelihood"):
        compare({"first": single(X, labels), "second": classifier}, (X, labels))


def test_likelihoods_of_the_same_labels_are_compared_with_a_note():
    X, Y = inputs(), targets("logistic", inputs())
    variational = (Sparse(X[:5]), LogisticLikelihood())
    models = {"linear": build("probit", X=X, Y=Y), "sparse": variational}
    with pytest.warns(UserWarning) as caught:
        table = compare(models, (X, Y), held_out=None)
    assert len(table.notes) == 2 == len(caught)
    assert (
        "'linear' has a BernoulliLikelihood and 'sparse' a Logistic" in table.notes[0]
    )


@quiet
def test_bad_arguments_are_refused():
    X, Y = data()
    with pytest.raises(ValueError, match="at least one entry, but is {}"):
        compare({})
    with pytest.raises(ValueError, match="a dictionary of models by name"):
        compare([single(X, Y)])
    with pytest.raises(ValueError, match="held_out must be one of 'leave_one_out'"):
        compare({"a": single(X, Y)}, held_out="loo")
    with pytest.raises(ValueError, match="'s' is a variational GP, which keeps no"):
        compare({"s": (Sparse(X[:3]), likelihood())})
    batch = SingleTaskGP(torch.stack([X, X]), torch.stack([Y, Y]))
    with pytest.raises(ValueError, match="'b' is a batch of models, .2,."):
        compare({"b": batch})
    with pytest.raises(TypeError, match="but model is Linear"):
        compare({"net": nn.Linear(1, 1)})


@quiet
def test_a_gp_of_gpytorchs_own_needs_no_botorch():
    X, Y = data()

    class Plain(ExactGP):
        def __init__(self):
            super().__init__(X, Y[:, 0], GaussianLikelihood())
            self.inner = single(X, Y)
            self.double()

        def forward(self, X):
            return self.inner.forward(X)

    table = compare({"plain": Plain()}, held_out=(X[:3], Y[:3]))
    assert table.rows[0].held_out is not None
