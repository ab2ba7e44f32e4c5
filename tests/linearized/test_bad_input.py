"""What is refused at the doors of the model and the kernel, by message.

Numbers in the ids are those of the project's catalogue of bad input and faults.
"""

import pytest
import torch
from botorch.exceptions.errors import InputDataError
from botorch.models.transforms import Normalize, Standardize, Warp
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    BetaLikelihood,
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    MultitaskGaussianLikelihood,
    SoftmaxLikelihood,
)
from torch import nn

from gpbridge import Exact, LinearizedGP
from gpbridge.checks import ShapeError
from gpbridge.dnn import fit_map
from gpbridge.kernels import NeuralTangentKernel
from gpbridge.likelihoods import LogisticLikelihood
from gpbridge.selection import fit_evidence
from gpbridge.testing import assert_module_unchanged
from tests.linearized.problems import (
    build,
    inputs,
    multitask,
    network,
    point_noise,
    targets,
)

X, Y = inputs(), targets("gaussian", inputs())
LABELS = targets("softmax", X)
CLASSES = SoftmaxLikelihood(num_classes=3, mixing_weights=False)


def with_value(tensor, row, value):
    tensor = tensor.clone()
    tensor[row] = value
    return tensor


NAN, INF = float("nan"), float("inf")
DATA = {
    "01-nan-in-X": ({"train_X": with_value(X, 3, NAN)}, InputDataError,
        r"train_X contains NaN or Inf in 1 of 12 rows, the first at \[3\]. Drop"),
    "02-inf-in-X": ({"train_X": with_value(X, 3, INF)}, InputDataError,
        r"train_X contains NaN or Inf in 1 of 12 rows, the first at \[3\]"),
    "03-nan-in-Y": ({"train_Y": with_value(Y, 5, NAN)}, InputDataError,
        r"train_Y contains NaN or Inf in 1 of 12 rows, the first at \[5\]"),
    "03-nan-in-Y-with-transform": (
        {"train_Y": with_value(Y, 5, NAN), "outcome_transform": Standardize(1)},
        InputDataError, r"train_Y contains NaN or Inf in 1 of 12 rows"),
    "04-inf-in-Y": ({"train_Y": with_value(Y, 5, -INF)}, InputDataError,
        r"train_Y contains NaN or Inf in 1 of 12 rows, the first at \[5\]"),
    "05-empty": ({"train_X": X[:0], "train_Y": Y[:0]}, InputDataError,
        r"train_X has no rows \(shape \(0, 2\)\). A model without data is its prior"),
    "07-X-one-dimensional": ({"train_X": X[:, 0]}, ShapeError,
        r"has shape \(12,\). For one input dimension try train_X\[:, None\]"),
    "07-X-three-dimensional": ({"train_X": X[None]}, ShapeError,
        r"must be ``n x d``, but has shape \(1, 12, 2\).*in a ModelListGP"),
    "08-Y-one-dimensional": ({"train_Y": Y[:, 0]}, ShapeError,
        r"``12 x 1`` .* has shape \(12,\). Try train_Y.unsqueeze\(-1\)"),
    "09-lengths-differ": ({"train_Y": Y[:7]}, ShapeError,
        r"``12 x 1`` .* has shape \(7, 1\). Pass one row of targets for each row"),
    "10-width-of-the-network": ({"train_X": torch.cat([X, X], -1)}, ShapeError,
        r"an X of 4 columns: .* layer '0', Linear, takes ``... x 2``, but got \(3, 4"),
    "10-input-shape": ({"input_shape": (1, 3)}, ShapeError,
        r"input_shape \(1, 3\) has 3 entries, but X has 2 columns"),
    "11-Y-in-float32": ({"train_Y": Y.float()}, TypeError,
        r"train_Y must be torch.float64 as the training inputs are, but is torch.floa"),
    "12-integer-X": ({"train_X": X.long()}, TypeError,
        r"train_X must be float32 or float64, but is torch.int64. Try train_X.double"),
    "13-integer-Y": ({"train_Y": (10 * Y).long()}, TypeError,
        r"integers other than 0 and 1 .* For regression try train_Y.double\(\)"),
    "13-integer-Y-gaussian": (
        {"train_Y": (10 * Y).long(), "likelihood": GaussianLikelihood()},
        TypeError, r"must be float32 or float64 for GaussianLikelihood, but is torch."),
    "13-bool-Y-gaussian": (
        {"train_Y": Y > 0, "likelihood": GaussianLikelihood()},
        TypeError, r"must be float32 or float64 for GaussianLikelihood, but is torch."),
    "22-array": ({"train_X": X.numpy()}, TypeError,
        r"train_X must be a torch.Tensor, but is ndarray. Try torch.as_tensor\(train_"),
    "22-list": ({"train_Y": Y.tolist()}, TypeError,
        r"train_Y must be a torch.Tensor, but is list. Try torch.as_tensor\(train_Y"),
    "22-sparse": ({"train_X": X.to_sparse()}, TypeError,
        r"train_X must be dense, but its layout is torch.sparse_coo. Try train_X.to_d"),
    "24-Y-elsewhere": ({"train_Y": Y.to("meta")}, ValueError,
        r"one device, but train_X is on cpu, train_Y is on meta. Move them with"),
    "25-half-X": ({"train_X": X.half(), "train_Y": Y.half()}, TypeError,
        r"train_X must be float32 or float64, but is torch.float16"),
    "25-half-Y": ({"train_Y": Y.bfloat16()}, TypeError,
        r"train_Y must be float32 or float64 for GaussianLikelihood, but is torch.bfl"),
    "28-no-noise": ({"noise": 0.0}, ValueError, "noise must be positive and finite, b"),
    "28-negative-noise": ({"noise": -1.0}, ValueError, r"noise must be .* but is -1.0"),
    "28-nan-noise": ({"noise": NAN}, ValueError, "noise must be .* but is nan"),
    "noise-word": ({"noise": "learned"}, ValueError,
        r"noise must be one of 'learn', 'fit_residual', 'validation', but is 'learned"),
    "noise-from-nowhere": ({"noise": "validation"}, ValueError,
        "noise='validation' needs a fit result with validation rows. Train with"),
    "noise-for-the-networks-mean": ({"mean": "network"}, ValueError,
        "mean='network' cannot learn its noise: .* Pass noise='fit_residual'"),
    "noise-twice": (
        {"likelihood": FixedNoiseGaussianLikelihood(point_noise()), "noise": 0.1},
        ValueError, "noise=0.1 has no effect with FixedNoiseGaussianLikelihood"),
    "noise-of-other-rows": (
        {"likelihood": FixedNoiseGaussianLikelihood(point_noise(7))},
        ShapeError, "holds the noise of 7 points, but there are 12"),
    "mean-word": ({"mean": "linear"}, ValueError,
        "mean must be one of 'auto', 'linear_model', 'network', but is 'linear'"),
    "select-word": ({"select": "best"}, ValueError, "select must be one of None, 'val"),
    "groups-word": ({"groups": "weights"}, ValueError, "groups must be one of 'all',"),
    "parameters-name": ({"parameters": ["3"]}, ValueError,
        r"parameters names \['3'\], which the network does not have. It has \['0.weig"),
    "parameters-word": ({"parameters": "first"}, ValueError,
        r"must be 'all', 'last_layer', 'without_normalization', .*, but is 'first'"),
    "37-no-weight-left": ({"parameters": lambda name: False}, ValueError,
        r"no random weight left: 4 parameters, 4 of them with requires_grad, none sel"),
    "inference-word": ({"inference": "exact"}, TypeError,
        r"inference must be gpbridge.linearized.Exact\(...\), Sampled\(...\), Kron"),
    "likelihood-of-no-rule": ({"likelihood": BetaLikelihood()}, NotImplementedError,
        "has no rule for BetaLikelihood; it has rules for BernoulliLikelihood, Fixed"),
    "network-of-no-kind": ({"network": lambda x: x}, TypeError,
        "network must be a torch.nn.Module, but is function"),
    "learnable-input-transform": (
        {"input_transform": Warp(2, indices=[0, 1])}, ValueError,
        "Warp has learnable parameters, but the network was trained on fixed inputs"),
    "outputs-of-the-network": (
        {"network": network(2)}, ShapeError,
        r"``n x 2`` .* \(12, 1\). Give the network one output per column of targets"),
    "outputs-of-the-likelihood": (
        {"network": network(2), "likelihood": GaussianLikelihood()}, ShapeError,
        "models 1 output, but the network has 2. Try MultitaskGaussianLikelihood"),
}  # fmt: skip


@pytest.mark.parametrize("options, error, message", DATA.values(), ids=DATA.keys())
def test_regression_data_and_options(options, error, message):
    options = {"network": network(), "train_X": X, "train_Y": Y} | options
    watched = options["network"]
    state = torch.get_rng_state()
    if isinstance(watched, nn.Module):
        with assert_module_unchanged(watched), pytest.raises(error, match=message):
            LinearizedGP(**options)
    else:
        with pytest.raises(error, match=message):
            LinearizedGP(**options)
    assert torch.equal(state, torch.get_rng_state())


LABELLED = {
    "14-float-labels": (3, LABELS.double(), CLASSES, TypeError,
        r"integer class labels for a softmax likelihood, but is torch.float64. Try"),
    "14-float-labels-by-default": (3, LABELS.double(), None, TypeError,
        r"must hold integer class labels for a softmax likelihood, but is torch.float"),
    "15-label-too-large": (3, with_value(LABELS, 4, 3), CLASSES, InputDataError,
        r"must lie in 0 .. 2 \(the network has 3 outputs\), but row 4 is 3. Drop"),
    "15-label-too-large-by-default": (3, with_value(LABELS, 4, 7), None, InputDataError,
        r"must lie in 0 .. 2 .* but row 4 is 7"),
    "16-ignored-label": (3, with_value(LABELS, 2, -100), CLASSES, InputDataError,
        r"must lie in 0 .. 2 .* but row 2 is -100. Drop ignored rows"),
    "one-hot-labels": (3, nn.functional.one_hot(LABELS, 3), CLASSES, ShapeError,
        r"``n`` class labels, but has shape \(12, 3\). .* .argmax\(-1\) for one-hot"),
    "labels-of-other-rows": (3, LABELS[:7], CLASSES, ShapeError,
        r"train_Y must have 12 rows as the inputs have, but has shape \(7,\)"),
    "labels-elsewhere": (3, LABELS.to("meta"), CLASSES, ValueError,
        "train_X is on cpu, train_Y is on meta"),
    "binary-2": (1, torch.full((12,), 2.0), LogisticLikelihood(), InputDataError,
        "must hold 0 and 1 for a binary likelihood, but contains 2.0"),
    "binary-minus-1": (1, Y[:, 0].sign(), BernoulliLikelihood(), InputDataError,
        "must hold 0 and 1 for a binary likelihood, but contains -1.0"),
    "binary-nan": (1, with_value((Y > 0).double(), 3, NAN), LogisticLikelihood(),
        InputDataError, r"train_Y contains NaN or Inf in 1 of 12 rows"),
    "network-of-one-output": (1, LABELS, CLASSES, ShapeError,
        "one output per class, but the network has one output. For two classes try"),
    "network-of-more-outputs": (4, LABELS, CLASSES, ShapeError,
        r"models 3 classes, but the network has 4 outputs. Try SoftmaxLikelihood\(num"),
    "network-of-three-for-binary": (3, LABELS, LogisticLikelihood(), ShapeError,
        r"models one output, but the network has 3. Try SoftmaxLikelihood\(num_classe"),
    "network-of-two-for-three-tasks": (2, torch.cat([Y, Y], -1),
        MultitaskGaussianLikelihood(3), ShapeError,
        r"models 3 outputs, but the network has 2. Try MultitaskGaussianLikelihood\(n"),
    "mixing-weights": (3, LABELS, SoftmaxLikelihood(num_features=3, num_classes=3),
        ValueError, "must have mixing_weights=False: the network's outputs are the lo"),
}  # fmt: skip


@pytest.mark.parametrize(
    "m, labels, likelihood, error, message", LABELLED.values(), ids=LABELLED.keys()
)
def test_labels_and_outputs(m, labels, likelihood, error, message):
    net = network(m)
    with assert_module_unchanged(net), pytest.raises(error, match=message):
        LinearizedGP(net, X, labels, likelihood)


def test_an_outcome_transform_of_labels():
    for likelihood in (CLASSES, None):
        with pytest.raises(
            ValueError, match="outcome_transform needs a Gaussian likel"
        ):
            LinearizedGP(
                network(3), X, LABELS, likelihood, outcome_transform=Standardize(1)
            )


def test_one_hot_rows_are_announced_as_a_regression():
    rows = nn.functional.one_hot(LABELS, 3).double()
    for transform in (None, Standardize(3)):
        with pytest.warns(UserWarning, match=r"one-hot, .* pass train_Y.argmax\(-1\)"):
            model = LinearizedGP(network(3), X, rows, outcome_transform=transform)
        assert isinstance(model.likelihood, MultitaskGaussianLikelihood)
    # On purpose, without a warning; and what only looks like it at a glance.
    tasks = MultitaskGaussianLikelihood(3, rank=0).double()
    LinearizedGP(network(3), X, rows, tasks)
    rows[0] = torch.tensor([1.0, 1.0, 0.0])
    LinearizedGP(network(3), X, rows)


def test_a_network_that_ends_in_a_softmax():
    torch.manual_seed(0)
    logits = nn.Sequential(nn.Linear(X.shape[-1], 5), nn.Tanh(), nn.Linear(5, 3))
    logits.double()
    with pytest.raises(ValueError, match=r"must return logits.*nn\.Softmax"):
        LinearizedGP(nn.Sequential(logits, nn.Softmax(-1)), X, LABELS)
    LinearizedGP(nn.Sequential(logits, nn.LogSoftmax(-1)), X, LABELS)


def test_noise_that_has_no_variance_per_output():
    with pytest.raises(TypeError, match="cannot be set to one variance per output"):
        LinearizedGP(network(2), X, torch.cat([Y, Y], -1), multitask(1), noise=0.1)


def test_a_probit_likelihood_under_logits_is_announced():
    net = Misbehaving(lambda self, x: 1.5 * torch.tanh(20 * self.layer(x)))
    with torch.no_grad():  # log odds of 1.5 that are right in ten rows of twelve
        labels = (net(X)[:, 0] > 0).double()
    labels[:2] = 1 - labels[:2]
    with pytest.warns(UserWarning, match="is the probit link, under which the labels"):
        LinearizedGP(net, X, labels, BernoulliLikelihood())


# -- networks -------------------------------------------------------------------------


class Misbehaving(nn.Module):
    """A linear layer, and one thing that a tangent model cannot have."""

    def __init__(self, output):
        super().__init__()
        self.layer, self.output = nn.Linear(2, 1).double(), output
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        return self.output(self, x)


def counts(self, x):
    self.count += 1
    return self.layer(x)


NETWORKS = {
    "39-detached": (lambda self, x: self.layer(x).detach(), ValueError,
        "does not depend on its random weights in a differentiable way"),
    "39-rounded": (lambda self, x: self.layer(x).round(), ValueError,
        "zero derivative in every random weight at the first rows"),
    "39-weights-without-effect": (lambda self, x: x[:, :1] + 0 * self.layer(x),
        ValueError, "zero derivative in every random weight at the first rows"),
    "41-fresh-randomness": (
        lambda self, x: self.layer(x) + torch.randn(len(x), 1).double(), ValueError,
        "different values for the same inputs in eval mode, so it draws fresh random"),
    "41-changes-itself": (counts, ValueError,
        r"changes itself in forward: \['count'\] moved, in eval mode"),
    "41-mixes-rows": (lambda self, x: self.layer(x) - self.layer(x).mean(0),
        ValueError, r"mixes rows: f\(X\)\[0\] differs from f\(X\[:1\]\)"),
    "42-tuple": (lambda self, x: (self.layer(x),), TypeError,
        "must return one tensor, but returns tuple. Wrap it in a module whose forward"),
    "42-dictionary": (lambda self, x: {"mean": self.layer(x)}, TypeError,
        "must return one tensor, but returns dict"),
    "42-too-many-axes": (lambda self, x: self.layer(x)[:, :, None], ShapeError,
        r"``n x m`` or ``n``, but 3 rows of \(2,\) gave \(3, 1, 1\). Flatten the outp"),
    "42-a-sum-over-rows": (lambda self, x: self.layer(x).sum(0), ShapeError,
        r"``n x m`` or ``n``, but 3 rows of \(2,\) gave \(1,\)"),
    "nan": (lambda self, x: self.layer(x) * NAN, ValueError,
        "returns NaN or Inf on the first rows. Check its weights and the scale"),
}  # fmt: skip


@pytest.mark.parametrize(
    "output, error, message", NETWORKS.values(), ids=NETWORKS.keys()
)
def test_networks(output, error, message):
    net = Misbehaving(output)
    state = torch.get_rng_state()
    with assert_module_unchanged(net):
        with pytest.raises(error, match=message):
            LinearizedGP(net, X, Y)
        with pytest.raises(error, match=message):
            NeuralTangentKernel(net)(X).to_dense()
    if "fresh" not in message:
        assert torch.equal(state, torch.get_rng_state())


def test_37_frozen_weights():
    net = network().requires_grad_(False)
    with assert_module_unchanged(net):
        with pytest.raises(
            ValueError, match="4 parameters, 0 of them with requires_grad"
        ):
            LinearizedGP(net, X, Y)


def test_24_a_network_elsewhere():
    with pytest.raises(ValueError, match="network is on meta, but train_X is on cpu"):
        LinearizedGP(network().to("meta"), X, Y)


def nan_below_a_quarter(self, x):
    return self.layer(x) * torch.where(x[:, :1] < 0.25, NAN, 1.0)


def test_nan_from_the_network_on_some_rows_only():
    bad = X[:, 0] < 0.25
    rows = torch.nonzero(bad).flatten().tolist()
    assert 0 < len(rows) < 12 and rows[0] > 2  # the probe does not see them
    with pytest.raises(
        (ValueError, InputDataError), match=rf"NaN or Inf in {len(rows)}"
    ):
        LinearizedGP(Misbehaving(nan_below_a_quarter), X, Y)
    model = LinearizedGP(Misbehaving(nan_below_a_quarter), X[~bad], Y[~bad])
    for call in (model.posterior, model.predict):
        with pytest.raises((ValueError, InputDataError), match="NaN or Inf"):
            call(X[bad])


# -- new inputs -----------------------------------------------------------------------

NEW = {
    "01-nan": (with_value(X, 3, NAN), InputDataError, "X contains NaN or Inf in 1 of"),
    "07-one-dimensional": (X[:, 0], ShapeError, r"X must be ``... x n x d``, but has"),
    "07-one-point": (X[0], ShapeError, r"\(2,\). For one point try X\[None\]"),
    "10-other-width": (X[:, :1], ShapeError,
        r"X must have 2 columns as the training inputs have, but has 1 \(shape \(12,"),
    "11-other-dtype": (X.float(), TypeError,
        r"X must be torch.float64 as the training inputs are, but is torch.float32. T"),
    "12-integers": (X.long(), TypeError, "X must be float32 or float64, but is torch."),
    "22-array": (X.numpy(), TypeError, "X must be a torch.Tensor, but is ndarray"),
    "24-elsewhere": (X.to("meta"), ValueError, "X is on meta, train_X is on cpu"),
}  # fmt: skip


@pytest.mark.parametrize("name", ["gaussian", "softmax"])
@pytest.mark.parametrize("bad, error, message", NEW.values(), ids=NEW.keys())
def test_new_inputs(bad, error, message, name):
    model = build(name)
    before = model.posterior(X).mean
    for call in (model.posterior, model.predict):
        with pytest.raises(error, match=message):
            call(bad)
    torch.testing.assert_close(model.posterior(X).mean, before, rtol=0, atol=0)


# -- hyperparameters ------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, -1.0, NAN, INF])
def test_prior_variances_that_are_not_positive(value):
    model = build("gaussian")
    with pytest.raises(ValueError, match="prior_variance must be positive and finite"):
        model.prior_variance = value
    with pytest.raises(ValueError, match="prior_variance must be positive and finite"):
        build("gaussian", groups="layer").prior_variance = torch.tensor([1.0, value])
    assert model.prior_variance.item() == pytest.approx(0.4)


def test_prior_variances_out_of_bounds():
    model = build("gaussian")
    with pytest.raises(
        ValueError, match=r"must lie in \[.*\], but is 1e\+20. Scale the"
    ):
        model.prior_variance = 1e20


def test_32_matrices_beyond_the_memory_budget():
    model = build("gaussian", inference=Exact(memory_budget=1000))
    message = "12 points with 1 outputs and 25 random weights, in function space, needs"
    for call in (model.log_evidence, model.evidence, lambda: fit_evidence(model)):
        with pytest.raises(MemoryError, match=message):
            call()
    expected = build("gaussian").posterior(X)  # prediction goes on without a matrix
    torch.testing.assert_close(
        model.posterior(X).variance, expected.variance, rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"space": "both"},
            "space must be one of 'auto', 'weight', 'function', 'matri",
        ),
        ({"memory_budget": 0.0}, "memory_budget must be positive"),
        ({"tolerance": -1e-3}, "tolerance must be positive"),
        ({"jacobian_dtype": torch.half}, "jacobian_dtype must be one of None, torch.f"),
    ],
)
def test_options_of_the_inference(options, message):
    with pytest.raises(ValueError, match=message):
        Exact(**options)


def test_evidence_of_something_else():
    with pytest.raises(
        TypeError, match="needs a gpbridge.LinearizedGP, but model is Seq"
    ):
        fit_evidence(network())


# -- what looks bad and works ---------------------------------------------------------


def finite(model):
    for _ in range(2):  # before and after the fit
        mean, covariance = model.marginals(X)
        assert torch.isfinite(mean).all() and torch.isfinite(covariance).all()
        assert (covariance.diagonal(dim1=-2, dim2=-1) >= 0).all()
        law = model.predict(X)
        assert torch.isfinite(law.probs if hasattr(law, "probs") else law.stddev).all()
        assert torch.isfinite(model.posterior(X).mean).all()
        assert torch.isfinite(fit_evidence(model, warn=False).value)


def test_06_one_row():
    finite(LinearizedGP(network(), X[:1], Y[:1]))
    finite(LinearizedGP(network(), X[:1], Y[:1], outcome_transform=Standardize(1)))


@pytest.mark.parametrize("m", [1, 3])
def test_17_a_single_class(m):
    finite(LinearizedGP(network(m), X, torch.zeros(12, dtype=torch.long)))


def test_18_duplicated_rows():
    finite(LinearizedGP(network(), X[:1].expand(12, 2), Y))
    finite(LinearizedGP(network(), torch.cat([X] * 4), torch.cat([Y] * 4)))


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5])
@pytest.mark.parametrize("transformed", [False, True])
def test_19_constant_targets(value, transformed):
    options = {"outcome_transform": Standardize(1)} if transformed else {}
    Y = torch.full((12, 1), value, dtype=torch.float64)
    model = LinearizedGP(network(), X, Y, **options)
    assert isinstance(model.likelihood, GaussianLikelihood)
    finite(model)


def test_arguments_in_another_order():
    with pytest.raises(TypeError, match=r"but is a Tensor\. The network comes first"):
        LinearizedGP(X, Y, network())
    with pytest.raises(TypeError, match="but is Sequential. For a network that you"):
        LinearizedGP.from_fit(network(), X, Y)
    run = fit_map(network(), X, Y, epochs=1, progress=False)
    with pytest.raises(TypeError, match="but is a FitResult. Use LinearizedGP.from_f"):
        LinearizedGP(run, X, Y)


def test_images_that_were_not_flattened():
    images = torch.zeros(5, 1, 4, 4, dtype=torch.float64)
    expected = r"try train_X\.flatten\(1\) with input_shape=\(1, 4, 4\)"
    with pytest.raises(ShapeError, match=expected):
        LinearizedGP(nn.Flatten(), images, Y[:5])


def test_20_a_constant_column():
    constant = torch.cat([X[:, :1], torch.ones(12, 1).double()], -1)
    finite(LinearizedGP(network(), constant, Y))
    bounds = torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    transform = Normalize(2, bounds=bounds)
    finite(LinearizedGP(network(), constant, Y, input_transform=transform))


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_21_extreme_scales(scale):
    finite(LinearizedGP(network(), X, scale * Y))
    finite(LinearizedGP(network(), scale * X, Y))


def test_28_noise_that_upstream_rounds_up():
    # Silence here: upstream warns when the likelihood is built.
    with pytest.warns(Warning, match="Very small noise values detected"):
        likelihood = FixedNoiseGaussianLikelihood(torch.zeros(12).double())
    finite(LinearizedGP(network(), X, Y, likelihood))


def test_34_and_35_networks_in_train_mode():
    net = nn.Sequential(
        nn.Linear(2, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 1)
    ).double()
    net(X)
    net.train()
    with assert_module_unchanged(net):
        finite(LinearizedGP(net, X, Y))
