"""Data on its way to a model: splits, scaling, minibatches, files, toy problems.

In: row counts, tensors, folders of ``.npz`` files. Out: tensors and row numbers.
Randomness comes from a ``generator``; None means a fresh one with seed 0, so that a
forgotten argument gives the same rows again. Next: any model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpbridge.checks import (
    ShapeError,
    check_inputs,
    check_not_empty,
    check_same_length,
    check_tensor,
)


def holdout_rows(
    n: int, fraction: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Split the rows 0 .. n - 1 at random.

    Args:
        n: Number of rows, at least 2.
        fraction: Share to hold out; rounded, at least one row and at most n - 1.
        generator: Source of randomness; None is a fresh one with seed 0.

    Returns:
        Row numbers to fit on and row numbers held out, both increasing.

    Raises:
        ValueError: If there are fewer than 2 rows or the fraction is not inside (0, 1).
    """
    if n < 2:
        raise ValueError(
            f"n must be at least 2 to hold out a row, but is {n}. Use all rows to fit."
        )
    if not 0 < fraction < 1:
        raise ValueError(
            f"fraction must lie strictly between 0 and 1, but is {fraction}. To hold "
            "out a tenth of the rows pass 0.1."
        )
    held_out = min(max(round(n * fraction), 1), n - 1)
    generator = _or_seed_zero(generator)
    order = torch.randperm(n, generator=generator, device=generator.device)
    return order[held_out:].sort().values, order[:held_out].sort().values


@dataclass(frozen=True)
class Standardizer:
    """The affine map that gave some columns mean 0 and variance 1.

    Attributes:
        mean: Column means, ``d``, in float64.
        std: Column standard deviations, ``d``, in float64; 1 for constant columns.
    """

    mean: Tensor
    std: Tensor

    def transform(self, X: Tensor) -> Tensor:
        """Scale ``... x d`` values, in their dtype."""
        return ((X.double() - self.mean) / self.std).to(X.dtype)

    def inverse(self, Z: Tensor) -> Tensor:
        """Undo :meth:`transform`."""
        return (Z.double() * self.std + self.mean).to(Z.dtype)

    def inverse_variance(self, variance: Tensor) -> Tensor:
        """Bring variances ``... x d`` of scaled values into squared original units."""
        return (variance.double() * self.std.square()).to(variance.dtype)


def standardize(X: Tensor) -> tuple[Tensor, Standardizer]:
    """Shift and scale columns to mean 0 and variance 1 over the rows.

    Columns that are constant up to rounding, and so every column of a single row,
    become 0 and are not scaled. Moments are taken in float64.

    Args:
        X: Values, ``n x d``.

    Returns:
        The scaled values and the map, to be applied to other rows.

    Raises:
        ShapeError: If ``X`` is not a matrix.

    Example:
        >>> Z, scaler = standardize(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
        >>> Z.tolist(), scaler.inverse(Z).tolist()
        ([[-1.0, 0.0], [1.0, 0.0]], [[1.0, 5.0], [3.0, 5.0]])
    """
    check_inputs(X, "X")
    if X.dim() != 2:
        raise ShapeError(
            f"X must be ``n x d``, but has shape {tuple(X.shape)}. Try .flatten(0, -2)."
        )
    check_not_empty(X=X)
    mean = X.double().mean(0)
    std = X.double().std(0, correction=0)
    std = torch.where(_is_constant(X), 1.0, std)
    scaler = Standardizer(mean, std)
    return scaler.transform(X), scaler


def drop_constant_columns(train_X: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Keep the columns that vary over the training rows, in all tensors given.

    Subsampling rows can make further columns constant, so drop after it.

    Args:
        train_X: Training inputs ``n x d``, which decide.
        others: More inputs of the same width.

    Returns:
        All of them with the remaining columns.
    """
    check_inputs(train_X)
    check_not_empty(train_X=train_X)
    varies = ~_is_constant(train_X)
    for other in others:
        check_inputs(other, "others", width=train_X.shape[-1])
    return tuple(X[..., varies] for X in (train_X, *others))


class Minibatches:
    """Shuffled minibatches of tensors that share their rows; can be iterated again.

    Every pass is a new order, a function of the generator's state at construction and
    of the number of the pass, so that passes neither disturb each other nor anything
    else. The rows are copied batch by batch.

    Args:
        tensors: One or more tensors with the same number of rows.
        batch_size: Rows per batch; the last batch of a pass may be smaller.
        generator: Source of randomness; None is a fresh one with seed 0.
        shuffle: False keeps the order of the rows.

    Raises:
        ValueError: If no tensor is given or the batch size is not positive.
    """

    def __init__(
        self,
        *tensors: Tensor,
        batch_size: int,
        generator: torch.Generator | None = None,
        shuffle: bool = True,
    ) -> None:
        if not tensors:
            raise ValueError("Minibatches needs at least one tensor, as X or X, Y.")
        named = {f"tensors[{i}]": tensor for i, tensor in enumerate(tensors)}
        check_tensor(**named)
        check_not_empty(**named)
        check_same_length(**named)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, but is {batch_size}.")
        self.tensors = tensors
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.passes = 0
        generator = _or_seed_zero(generator)
        self.seed = int(
            torch.randint(2**62, (), generator=generator, device=generator.device)
        )

    def __len__(self) -> int:
        return math.ceil(len(self.tensors[0]) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        n = len(self.tensors[0])
        order = torch.arange(n)
        if self.shuffle:
            order = torch.randperm(
                n, generator=torch.Generator().manual_seed(self.seed + self.passes)
            )
        self.passes += 1
        return (
            tuple(tensor[rows.to(tensor.device)] for tensor in self.tensors)
            for rows in order.split(self.batch_size)
        )


def load_uci(
    path: str | PathLike,
    name: str,
    split: int = 0,
    *,
    drop_constant: bool = True,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read one train/test split of a regression set, in its own units.

    Args:
        path: Folder of ``<name>.npz`` files with ``X`` (n x d), ``y`` (n) and
            ``test_mask`` (splits x n).
        name: Name of the set, as ``"boston"``.
        split: Number of the split.
        drop_constant: Drop the columns that are constant in the training part.
        dtype: Type of the tensors.

    Returns:
        Training inputs ``n x d`` and targets ``n x 1``, then the same of the test part.

    Raises:
        ValueError: If there is no such split.
    """
    arrays = _load_npz(path, name)
    masks = arrays["test_mask"]
    if not 0 <= split < len(masks):
        raise ValueError(
            f"split must lie in 0 .. {len(masks) - 1} for {name}, but is {split}."
        )
    X = torch.from_numpy(arrays["X"]).to(dtype)
    Y = torch.from_numpy(arrays["y"]).to(dtype)[:, None]
    test = torch.from_numpy(masks[split])
    train_X, test_X = X[~test], X[test]
    if drop_constant:
        train_X, test_X = drop_constant_columns(train_X, test_X)
    return train_X, Y[~test], test_X, Y[test]


def load_images(
    path: str | PathLike,
    name: str,
    *,
    num_train: int | None = None,
    num_test: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read an image classification set, channels first, pixels in [0, 1].

    Args:
        path: Folder of ``<name>.npz`` files, or pairs ``<name>_train*.npz`` and
            ``<name>_test.npz``, with ``x_train``, ``y_train``, ``x_test``, ``y_test``.
        name: Name of the set, as ``"mnist"``.
        num_train: Take the first so many training images; None for all.
        num_test: The same for the test images.
        dtype: Type of the images.

    Returns:
        Training images ``n x c x h x w`` and long labels ``n``, then the test part's.
    """
    parts = sorted(Path(path).glob(f"{name}_t*.npz"))
    arrays = {}
    for stem in [part.stem for part in parts] or [name]:
        arrays |= _load_npz(path, stem)
    result = []
    for part, limit in (("train", num_train), ("test", num_test)):
        pixels = torch.from_numpy(arrays[f"x_{part}"][:limit])
        pixels = pixels[:, None] if pixels.dim() == 3 else pixels.movedim(-1, 1)
        labels = torch.from_numpy(arrays[f"y_{part}"][:limit])
        result += [pixels.to(dtype).contiguous() / 255, labels.long()]
    return tuple(result)


def load_series(
    path: str | PathLike, name: str, *, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Read a series in its own units and order.

    Args:
        path: Folder of ``<name>.npz`` files with ``X`` (n x 1) and ``y`` (n).
        name: Name of the series, as ``"mauna_loa_co2"``.
        dtype: Type of the tensors.

    Returns:
        Inputs ``n x 1`` and targets ``n x 1``.
    """
    arrays = _load_npz(path, name)
    X = torch.from_numpy(arrays["X"]).to(dtype)
    return X, torch.from_numpy(arrays["y"]).to(dtype)[:, None]


def sine_gap(
    n: int,
    generator: torch.Generator | None = None,
    *,
    noise_std: float = 0.1,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """A noisy sine seen on [-3, -1] and [1, 3] and not between.

    The toy on which a posterior shows whether it knows where it has no data.

    Args:
        n: Number of points, half of them on each side.
        generator: Source of randomness; None is a fresh one with seed 0.
        noise_std: Standard deviation of the noise on y = sin(2 x).
        dtype: Type of the tensors.

    Returns:
        Inputs and targets, both ``n x 1``, by increasing input.
    """
    generator = _or_seed_zero(generator)
    offset = 1 + 2 * torch.rand(n, dtype=torch.float64, generator=generator)
    side = torch.where(torch.arange(n) < n // 2, -1.0, 1.0)
    X = (side * offset).sort().values[:, None]
    noise = torch.randn(n, 1, dtype=torch.float64, generator=generator)
    return X.to(dtype), (torch.sin(2 * X) + noise_std * noise).to(dtype)


def two_moons(
    n: int,
    generator: torch.Generator | None = None,
    *,
    noise_std: float = 0.15,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Two interleaved half circles, one per class.

    Args:
        n: Number of points; classes alternate.
        generator: Source of randomness; None is a fresh one with seed 0.
        noise_std: Standard deviation of the noise on both coordinates.
        dtype: Type of the inputs.

    Returns:
        Inputs ``n x 2`` and long labels ``n``.
    """
    generator = _or_seed_zero(generator)
    labels = torch.arange(n) % 2
    angle = math.pi * torch.rand(n, dtype=torch.float64, generator=generator)
    upper = torch.stack([angle.cos(), angle.sin()], dim=-1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], dim=-1)
    X = torch.where(labels[:, None] == 0, upper, lower)
    X = X + noise_std * torch.randn(n, 2, dtype=torch.float64, generator=generator)
    return X.to(dtype), labels


def _or_seed_zero(generator: torch.Generator | None) -> torch.Generator:
    return torch.Generator().manual_seed(0) if generator is None else generator


def _is_constant(X: Tensor) -> Tensor:
    # Up to rounding: equal float32 values need not have a mean equal to them.
    spread = X.amax(0) - X.amin(0)
    return spread <= 8 * torch.finfo(X.dtype).eps * X.abs().amax(0)


def _load_npz(path: str | PathLike, name: str) -> dict[str, np.ndarray]:
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"path must be the folder that holds {name}.npz, but there is no folder "
            f"{folder}."
        )
    file = folder / f"{name}.npz"
    if not file.is_file():
        there = ", ".join(sorted(f.stem for f in folder.glob("*.npz"))) or "none"
        raise FileNotFoundError(
            f"There is no {name}.npz in {folder}. Pass the folder that holds the file "
            f"as path; names found here: {there}."
        )
    # A pickle can run code, so object arrays are refused.
    with np.load(file, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}
