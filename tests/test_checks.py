import pytest
import torch
from botorch.exceptions.errors import InputDataError

from gpbridge import checks
from gpbridge.checks import ShapeError

X = torch.zeros(3, 2)
NAN, INF = float("nan"), float("inf")
REFUSED = [
    (
        lambda: checks.check_tensor(train_X=[1.0]),
        TypeError,
        r"train_X must be a torch.Tensor, but is list. Try torch.as_tensor\(train_X\)",
    ),
    (
        lambda: checks.check_tensor(train_X=X.to_sparse()),
        TypeError,
        r"must be dense, but its layout is torch.sparse_coo. Try train_X.to_dense\(\)",
    ),
    (
        lambda: checks.check_floating(train_X=X.long()),
        TypeError,
        r"must be float32 or float64, but is torch.int64. Try train_X.double\(\)",
    ),
    (
        lambda: checks.check_floating(a=X, b=X.half()),
        TypeError,
        "b must be float32 or float64, but is torch.float16",
    ),
    (
        lambda: checks.check_finite(y=torch.tensor([[0.0], [NAN], [INF], [1.0]])),
        InputDataError,
        r"y contains NaN or Inf in 2 of 4 rows, the first at \[1, 2\]",
    ),
    (
        lambda: checks.check_finite(y=torch.tensor(NAN)),
        InputDataError,
        "y contains NaN or Inf in 1 of 1 rows",
    ),
    (
        lambda: checks.check_finite(y=torch.full((9, 2, 2), -INF)),
        InputDataError,
        r"in 9 of 9 rows, the first at \[0, 1, 2, 3, 4\]",
    ),
    (
        lambda: checks.check_inputs(torch.zeros(4)),
        ShapeError,
        r"``... x n x d``, but has shape \(4,\). .* try train_X\[:, None\]",
    ),
    (
        lambda: checks.check_inputs(torch.zeros(5), "X", width=5),
        ShapeError,
        r"``... x n x d``, but has shape \(5,\). For one point try X\[None\]",
    ),
    (
        lambda: checks.check_inputs(torch.zeros(4), "X", width=5),
        ShapeError,
        r"``... x n x d``, but has shape \(4,\). Pass rows of 5 columns",
    ),
    (
        lambda: checks.check_inputs(torch.zeros(1), "X", width=1),
        ShapeError,
        r"but has shape \(1,\). For one input dimension try X\[:, None\]",
    ),
    (
        lambda: checks.check_inputs(X, "test_X", width=5),
        ShapeError,
        r"test_X must have 5 columns .* has 2 \(shape \(3, 2\)\)",
    ),
    (
        lambda: checks.check_inputs([[1.0]], "X"),
        TypeError,
        "X must be a torch.Tensor, but is list",
    ),
    (
        lambda: checks.check_inputs(X.int(), "X"),
        TypeError,
        "X must be float32 or float64, but is torch.int32",
    ),
    (
        lambda: checks.check_inputs(X * NAN, "X"),
        InputDataError,
        "X contains NaN or Inf in 3 of 3 rows",
    ),
    (
        lambda: checks.check_not_empty(train_X=X[:0]),
        InputDataError,
        r"train_X has no rows \(shape \(0, 2\)\). A model without data is its prior",
    ),
    (
        lambda: checks.check_same_length(train_X=X, train_Y=X[:2]),
        ShapeError,
        "must agree, but train_X has 3, train_Y has 2",
    ),
    (
        lambda: checks.check_same_device(a=X, b=X.to("meta")),
        ValueError,
        r"on one device, but a is on cpu, b is on meta. Move them with .to",
    ),
    (
        lambda: checks.check_generator(torch.Generator(), torch.device("cuda")),
        ValueError,
        r"draws on cpu, but the model is on cuda. Try torch.Generator\('cuda'\)",
    ),
    (
        lambda: checks.check_same_dtype("test_X", X, torch.float64),
        TypeError,
        r"must be torch.float64 .* is torch.float32. Try test_X.to\(torch.float64\)",
    ),
    (
        lambda: checks.check_positive(noise=-0.1),
        ValueError,
        "noise must be positive and finite, but is -0.1.$",
    ),
    (
        lambda: checks.check_positive(a=1.0, b=torch.tensor([1.0, NAN])),
        ValueError,
        r"b must be positive and finite, but is \[1.0, nan\]",
    ),
    (lambda: checks.check_positive(a=INF), ValueError, "but is inf"),
    (
        lambda: checks.check_positive(a=torch.arange(-1.0, 9.0)),
        ValueError,
        "but is as low as -1.0",
    ),
    (
        lambda: checks.check_choice("space", "big", ("weight", "function")),
        ValueError,
        "space must be one of 'weight', 'function', but is 'big'",
    ),
    (
        lambda: checks.check_labels(torch.zeros(3), 2),
        TypeError,
        r"integer class labels .* is torch.float32. Try train_Y.long\(\)",
    ),
    (
        lambda: checks.check_labels(torch.zeros(3, dtype=torch.bool), 2),
        TypeError,
        "but is torch.bool",
    ),
    (
        lambda: checks.check_labels(torch.zeros(3, 1).long(), 2),
        ShapeError,
        r"``n`` class labels, but has shape \(3, 1\)",
    ),
    (
        lambda: checks.check_labels(torch.tensor([0, 1, 3, 2]), 3),
        InputDataError,
        r"0 .. 2 \(the network has 3 outputs\), but row 2 is 3. .* give the network",
    ),
    (
        lambda: checks.check_labels(torch.tensor([0, -100]), 3),
        InputDataError,
        "row 1 is -100. Drop ignored rows",
    ),
    (
        lambda: checks.check_binary(torch.tensor([0.0, 1.0, 0.5])),
        InputDataError,
        "must hold 0 and 1 for a binary likelihood, but contains 0.5",
    ),
    (
        lambda: checks.check_memory("K", 3 * 2**30, 2**30, "Use fewer points."),
        MemoryError,
        "K needs about 3.00 GiB, but the budget is 1.00 GiB. Use fewer points.",
    ),
]


@pytest.mark.parametrize("call, error, message", REFUSED)
def test_what_breaks_an_invariant_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_what_keeps_the_invariants_passes():
    checks.check_tensor(a=X, b=X)
    checks.check_floating(a=X, b=X.double())
    checks.check_finite(a=X, empty=X[:0], scalar=torch.tensor(1.0))
    checks.check_inputs(torch.zeros(2, 3, 4), width=4)
    checks.check_inputs(X[:0])
    checks.check_not_empty(a=X)
    checks.check_same_length(a=X, b=X[:, 0])
    checks.check_same_device(a=X, b=X)
    checks.check_generator(torch.Generator(), X.device)
    checks.check_same_dtype("a", X, torch.float32)
    checks.check_positive(a=1, b=1e-300, c=torch.ones(3))
    checks.check_choice("a", None, ("b", None))
    checks.check_labels(torch.tensor([0, 2, 1]), 3)
    checks.check_labels(torch.tensor([0, 1], dtype=torch.uint8), 2)
    checks.check_binary(torch.tensor([0, 1]))
    checks.check_binary(torch.tensor([[True], [False]]))
    checks.check_memory("K", 1.0, 1.0, "")


def test_a_shape_error_is_a_value_error():
    assert issubclass(ShapeError, ValueError)
