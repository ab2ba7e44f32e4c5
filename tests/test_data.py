import dataclasses
import math

import numpy as np
import pytest
import torch
from botorch.exceptions.errors import InputDataError
from sklearn.preprocessing import StandardScaler

from gpbridge import data
from gpbridge.checks import ShapeError

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "n, fraction, count", [(10, 0.1, 1), (2, 0.01, 1), (3, 0.99, 2), (101, 0.25, 25)]
)
def test_held_out_rows_complement_the_fit_rows(n, fraction, count):
    fit, held_out = data.holdout_rows(n, fraction, generator(1))
    assert len(held_out) == count
    assert torch.equal(torch.cat([fit, held_out]).sort().values, torch.arange(n))
    assert torch.equal(fit, fit.sort().values)


def test_a_split_depends_on_its_generator_only():
    before = torch.get_rng_state()
    first = data.holdout_rows(50, 0.2, generator(3))[1]
    assert torch.equal(first, data.holdout_rows(50, 0.2, generator(3))[1])
    assert not torch.equal(first, data.holdout_rows(50, 0.2, generator(4))[1])
    default = data.holdout_rows(50, 0.2)[1]
    assert torch.equal(default, data.holdout_rows(50, 0.2, generator(0))[1])
    assert torch.equal(before, torch.get_rng_state())


def test_standardize_agrees_with_scikit_learn():
    X = 5 + 3 * torch.randn(30, 4, dtype=torch.float64, generator=generator())
    Z, scaler = data.standardize(X)
    expected = torch.from_numpy(StandardScaler().fit_transform(X.numpy()))
    torch.testing.assert_close(Z, expected, **EXACT)
    torch.testing.assert_close(scaler.inverse(Z), X, **EXACT)
    variance = scaler.inverse_variance(torch.ones(1, 4, dtype=torch.float64))
    torch.testing.assert_close(variance[0], X.var(0, correction=0), **EXACT)


def test_a_single_row_and_a_constant_column_become_zero():
    Z, scaler = data.standardize(torch.tensor([[3.0, -2.0]]))
    assert Z.tolist() == [[0.0, 0.0]] and scaler.std.tolist() == [1.0, 1.0]
    # The mean of 0.1 over seven rows is not 0.1 in floating point.
    X = torch.cat([torch.full((7, 1), 0.1), torch.arange(7.0)[:, None]], dim=1)
    Z, scaler = data.standardize(X)
    assert Z[:, 0].abs().max() < 1e-6 and scaler.std[0] == 1
    assert scaler.transform(torch.tensor([[5.1, 3.0]]))[0].tolist() == [5.0, 0.0]


def test_a_large_offset_keeps_its_digits_in_float32():
    X = 2000 + torch.arange(12, dtype=torch.float32)[:, None] / 12
    Z, scaler = data.standardize(X)
    assert Z.dtype == torch.float32
    assert abs(Z.mean()) < 1e-6 and abs(Z.var(correction=0) - 1) < 1e-5
    torch.testing.assert_close(scaler.inverse(Z), X, rtol=2e-7, atol=0)


def test_a_standardizer_cannot_be_changed():
    _, scaler = data.standardize(torch.ones(2, 1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        scaler.mean = None


def test_constant_columns_of_the_training_part_are_dropped_everywhere():
    train = torch.tensor([[1.0, 2.0, 5.0], [1.0, 3.0, 5.0]])
    test = torch.tensor([[9.0, 4.0, 5.0]])
    train, test = data.drop_constant_columns(train, test)
    assert train.tolist() == [[2.0], [3.0]] and test.tolist() == [[4.0]]


def test_minibatches_cover_the_rows_once_per_pass_in_a_new_order():
    X = torch.arange(10.0)[:, None]
    batches = data.Minibatches(X, X[:, 0], batch_size=4, generator=generator())
    assert len(batches) == 3
    passes = []
    for _ in range(2):
        parts = list(batches)
        assert [len(x) for x, _ in parts] == [4, 4, 2]
        assert all(torch.equal(x[:, 0], y) for x, y in parts)
        passes.append(torch.cat([y for _, y in parts]))
        assert torch.equal(passes[-1].sort().values, X[:, 0])
    assert not torch.equal(*passes)


def test_minibatches_repeat_under_the_same_seed_and_do_not_disturb_each_other():
    X = torch.arange(20.0)

    def orders(interleave):
        batches = data.Minibatches(X, batch_size=3, generator=generator(5))
        first, second = iter(batches), iter(batches)
        if interleave:
            pairs = list(zip(first, second, strict=True))
            parts = [p[0] for p, _ in pairs], [q[0] for _, q in pairs]
        else:
            parts = [x for (x,) in first], [x for (x,) in second]
        return [torch.cat(part) for part in parts]

    before = torch.get_rng_state()
    for one, other in zip(orders(False), orders(True), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())


def test_minibatches_without_shuffling_keep_the_order():
    X = torch.arange(5)
    parts = data.Minibatches(X, batch_size=2, shuffle=False)
    assert torch.equal(torch.cat([x for (x,) in parts]), X)


@pytest.fixture
def folder(tmp_path):
    X = np.arange(12, dtype=np.float32).reshape(6, 2)
    X[:, 1] = [1, 1, 1, 1, 7, 8]
    mask = np.zeros((2, 6), dtype=bool)
    mask[0, 4:] = True
    mask[1, :2] = True
    y = np.arange(6, dtype=np.float32)
    np.savez(tmp_path / "tiny.npz", X=X, y=y, test_mask=mask)
    np.savez(tmp_path / "line.npz", X=X[:, :1], y=y)
    grey = np.array([0, 255, 51], dtype=np.uint8)[:, None, None].repeat(4, 1)
    labels = np.array([3, 1, 2], dtype=np.uint8)
    np.savez(
        tmp_path / "grey.npz", x_train=grey, y_train=labels, x_test=grey, y_test=labels
    )
    colour = np.zeros((3, 4, 5, 3), dtype=np.uint8)
    colour[..., 2] = 255
    np.savez(tmp_path / "colour_train10k.npz", x_train=colour, y_train=labels)
    np.savez(tmp_path / "colour_test.npz", x_test=colour[:2], y_test=labels[:2])
    return tmp_path


def test_load_uci_follows_the_mask_and_drops_constant_columns(folder):
    train_X, train_Y, test_X, test_Y = data.load_uci(folder, "tiny", split=0)
    assert train_X.dtype == torch.float64
    assert train_X.tolist() == [[0.0], [2.0], [4.0], [6.0]]
    assert test_X.tolist() == [[8.0], [10.0]] and test_Y.tolist() == [[4.0], [5.0]]
    train_X, train_Y, _, _ = data.load_uci(folder, "tiny", 1, dtype=torch.float32)
    assert train_X.shape == (4, 2) and train_Y.dtype == torch.float32
    kept = data.load_uci(folder, "tiny", drop_constant=False)[0]
    assert kept.shape == (4, 2)


def test_the_shipped_splits_cover_the_rows(data_path):
    train_X, train_Y, test_X, test_Y = data.load_uci(data_path / "uci", "naval", 3)
    assert len(train_X) + len(test_X) == 11934
    assert train_X.shape[1] == 14 and train_Y.shape[1] == 1  # two are constant
    image, label = data.load_images(data_path / "images", "cifar10", num_train=9)[:2]
    assert image.shape == (9, 3, 32, 32)
    assert label.tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8]
    assert data.load_series(data_path / "series", "mauna_loa_co2")[1].shape == (807, 1)


def test_load_images_puts_channels_first_and_pixels_in_the_unit_interval(folder):
    train_X, train_Y, test_X, _ = data.load_images(folder, "grey", num_test=2)
    assert train_X.shape == (3, 1, 4, 1) and test_X.shape == (2, 1, 4, 1)
    assert train_X[:, 0, 0, 0].tolist() == pytest.approx([0.0, 1.0, 0.2])
    assert train_Y.tolist() == [3, 1, 2] and train_Y.dtype == torch.int64
    train_X, _, test_X, test_Y = data.load_images(folder, "colour", num_train=1)
    assert train_X.shape == (1, 3, 4, 5) and len(test_X) == len(test_Y) == 2
    assert train_X[0, :, 0, 0].tolist() == [0.0, 0.0, 1.0]


def test_load_series_returns_columns_in_order(folder):
    X, Y = data.load_series(folder, "line")
    assert X.shape == Y.shape == (6, 1) and Y.dtype == torch.float64


@pytest.mark.parametrize("load", [data.load_uci, data.load_images, data.load_series])
def test_an_absent_file_or_folder_says_what_to_pass(folder, load):
    with pytest.raises(FileNotFoundError, match="found here: colour_test, .*, tiny"):
        load(folder, "huge")
    with pytest.raises(FileNotFoundError, match="path must be the folder that holds"):
        load(folder / "nowhere", "tiny")


def test_a_pickle_is_refused(folder):
    np.savez(folder / "evil.npz", X=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        data.load_series(folder, "evil")


def test_sine_gap_leaves_the_middle_empty():
    X, Y = data.sine_gap(31, generator())
    assert X.shape == Y.shape == (31, 1)
    assert (X.abs() >= 1).all() and (X.abs() <= 3).all() and (X.diff(dim=0) >= 0).all()
    assert (X < 0).sum() == 15
    X, Y = data.sine_gap(8, generator(), noise_std=0.0, dtype=torch.float32)
    torch.testing.assert_close(Y, torch.sin(2 * X))


def test_two_moons_are_separable_without_noise():
    X, labels = data.two_moons(40, generator(), noise_std=0.0)
    assert X.shape == (40, 2) and labels.dtype == torch.int64
    assert torch.allclose(X[labels == 0].norm(dim=-1), torch.ones(20).double())
    centre = torch.tensor([1.0, 0.5], dtype=torch.float64)
    assert torch.allclose(
        (X[labels == 1] - centre).norm(dim=-1), torch.ones(20).double()
    )


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: data.holdout_rows(1, 0.1), ValueError, "n must be at least 2"),
        (
            lambda: data.holdout_rows(9, 1.0),
            ValueError,
            "strictly between 0 and 1, but",
        ),
        (lambda: data.holdout_rows(9, math.nan), ValueError, "but is nan"),
        (lambda: data.standardize(torch.ones(3)), ShapeError, r"X\[:, None\]"),
        (
            lambda: data.standardize(torch.ones(2, 3, 1)),
            ShapeError,
            "X must be ``n x d",
        ),
        (lambda: data.standardize(torch.ones(0, 1)), InputDataError, "X has no rows"),
        (
            lambda: data.drop_constant_columns(torch.ones(2, 2), torch.ones(2, 3)),
            ShapeError,
            "others must have 2 columns",
        ),
        (lambda: data.Minibatches(batch_size=1), ValueError, "at least one tensor"),
        (
            lambda: data.Minibatches(torch.ones(2), batch_size=0),
            ValueError,
            "batch_size must be at least 1, but is 0",
        ),
        (
            lambda: data.Minibatches(torch.ones(2), torch.ones(3), batch_size=1),
            ShapeError,
            r"tensors\[1\] has 3",
        ),
    ],
)
def test_bad_input_is_refused_with_its_reason(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("split", [2, -1])
def test_an_absent_split_is_refused(folder, split):
    with pytest.raises(ValueError, match=f"split must lie in 0 .. 1 for tiny.*{split}"):
        data.load_uci(folder, "tiny", split)
