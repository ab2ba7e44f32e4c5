"""A loader in place of inputs and targets."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from gpbridge import Exact, LinearizedGP
from gpbridge.checks import ShapeError
from gpbridge.data import Minibatches
from gpbridge.linearized import Kronecker
from tests.linearized import problems
from tests.linearized.problems import build


def data(name="gaussian"):
    X = problems.inputs()
    return X, problems.targets(name, X)


def loader(X, Y, batch_size=5, **options):
    return DataLoader(TensorDataset(X, Y), batch_size=batch_size, **options)


@pytest.mark.parametrize("name", ["gaussian", "multitask", "logistic", "softmax"])
def test_a_loader_gives_the_model_of_its_tensors(name):
    X, Y = data(name)
    got = build(name, X=loader(X, Y), Y=None, loaded=True)
    expected = build(name)
    assert torch.equal(got._train_X, X) and torch.equal(got._targets, expected._targets)
    X_test = problems.inputs(4, seed=9)
    torch.testing.assert_close(
        got.posterior(X_test).variance, expected.posterior(X_test).variance
    )


def test_the_order_of_a_shuffled_loader_does_not_matter():
    X, Y = data()
    source = torch.Generator().manual_seed(0)
    shuffled = [
        loader(X, Y, shuffle=True, generator=source),
        Minibatches(X, Y, batch_size=5),
        [(X[6:], Y[6:]), (X[:6], Y[:6])],
    ]
    X_test, expected = problems.inputs(4, seed=9), build("gaussian")
    for batches in shuffled:
        model = build("gaussian", X=batches, loaded=True)
        assert not torch.equal(model._train_X, X)
        torch.testing.assert_close(
            model.posterior(X_test).mean, expected.posterior(X_test).mean
        )


def images(n=7):
    source = torch.Generator().manual_seed(0)
    X = torch.randn(n, 1, 4, 4, generator=source)
    return X, torch.arange(n) % 3


def cnn():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))


def test_images_are_flattened_and_their_shape_is_kept():
    X, Y = images()
    model = LinearizedGP(cnn(), loader(X, Y, 3), inference=Kronecker())
    assert model.functional.input_shape == (1, 4, 4)
    assert torch.equal(model._train_X, X.flatten(1))
    assert model.predict(X.flatten(1)).probs.shape == (7, 3)
    LinearizedGP(cnn(), loader(X, Y, 3), input_shape=(1, 4, 4))
    with pytest.raises(ShapeError, match=r"input_shape is \(1, 2, 8\), but .* \(1, 4"):
        LinearizedGP(cnn(), loader(X, Y, 3), input_shape=(1, 2, 8))


def test_numbers_without_an_axis_are_inputs_of_one_column():
    x, y = torch.linspace(0, 1, 6), torch.linspace(0, 1, 6)[:, None]
    model = LinearizedGP(nn.Linear(1, 1), loader(x, y))
    assert model._train_X.shape == (6, 1)


def test_copies_do_not_hold_the_loader():
    X, Y = data()
    model = build("gaussian", X=loader(X, Y), loaded=True)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.posterior(X).mean, model.posterior(X).mean)


class Shrinking:
    """Another number of rows at every pass."""

    def __init__(self, sizes):
        self.sizes, self.passes = sizes, 0

    def __iter__(self):
        X, Y = data()
        n = self.sizes[self.passes]
        self.passes += 1
        return iter([(X[:4], Y[:4]), (X[4:n], Y[4:n])])


@pytest.mark.parametrize("sizes, now", [((12, 9), "9"), ((9, 12), "12 or more")])
def test_a_loader_whose_length_changes_is_refused(sizes, now):
    message = f"{sizes[0]} rows in its first pass and {now} in its second"
    with pytest.raises(ValueError, match=message):
        LinearizedGP(problems.network(), Shrinking(sizes))


class Stream(IterableDataset):
    def __iter__(self):
        return zip(*data(), strict=True)


def test_a_stream_that_can_be_read_again_will_do():
    model = LinearizedGP(problems.network(), DataLoader(Stream(), batch_size=5))
    assert torch.equal(model._train_X, data()[0])


def test_what_can_be_iterated_once_is_refused():
    X, Y = data()
    for once in (
        iter([(X, Y)]),
        zip([X], [Y], strict=True),
        (pair for pair in [(X, Y)]),
    ):
        with pytest.raises(TypeError, match="iterated once only"):
            LinearizedGP(problems.network(), once)


@pytest.mark.parametrize("batches", [[], [(torch.zeros(0, 2), torch.zeros(0, 1))]])
def test_an_empty_loader_is_refused(batches):
    with pytest.raises(ValueError, match="gives no rows"):
        LinearizedGP(problems.network(), batches)


@pytest.mark.parametrize(
    "batch, message",
    [
        (torch.zeros(3, 2), "batch 0 is a Tensor"),
        ((torch.zeros(3, 2),), r"batch 0 is a tuple of 1 \(Tensor\)"),
        ({"x": 1, "y": 2}, "batch 0 is a dict"),
        ((torch.zeros(3, 2), [1, 2, 3]), r"a tuple of 2 \(Tensor, list\)"),
    ],
)
def test_batches_that_are_no_pairs_are_refused(batch, message):
    with pytest.raises(TypeError, match=message):
        LinearizedGP(problems.network(), [batch])


def test_batches_that_do_not_agree_are_refused():
    X, Y = data()
    with pytest.raises(ShapeError, match="batch 0 has inputs .* targets of shape"):
        LinearizedGP(problems.network(), [(X, Y[:5])])
    with pytest.raises(ShapeError, match=r"X of batch 1 has rows of shape \(1,\)"):
        LinearizedGP(problems.network(), [(X, Y), (X[:, :1], Y)])
    with pytest.raises(ShapeError, match="Y of batch 1 has .*float32 on cpu, after"):
        LinearizedGP(problems.network(), [(X, Y), (X, Y.float())])


def test_memory_is_estimated_before_it_is_taken():
    class Large:
        """Rows that take no memory of their own."""

        def __iter__(self):
            X, Y = torch.zeros(1).expand(2**20, 64), torch.zeros(1).expand(2**20, 1)
            return iter([(X, Y)] * 8)

    with pytest.raises(MemoryError, match="8388608 rows of 260 bytes.*2.*GiB"):
        LinearizedGP(nn.Linear(64, 1), Large(), inference=Exact(memory_budget=2**30))


def test_arguments_that_are_missing_or_too_many_are_named():
    X, Y = data()
    with pytest.raises(TypeError, match="train_Y is missing"):
        LinearizedGP(problems.network(), X)
    with pytest.raises(TypeError, match="DataLoader, .* train_Y must be left out"):
        LinearizedGP(problems.network(), loader(X, Y), Y)
    with pytest.raises(TypeError, match="train_X must be a torch.Tensor, but is list"):
        LinearizedGP(problems.network(), [X], Y)
    with pytest.raises(TypeError, match="train_X must be a torch.Tensor, but is ndarr"):
        LinearizedGP(problems.network(), X.numpy(), Y)
    with pytest.raises(TypeError, match="network must be a torch.nn.Module"):
        LinearizedGP(X, problems.network(), Y)
