import pytest
import torch
from linear_operator import to_linear_operator
from torch import nn

from gpbridge import partial_products
from gpbridge.functional import FunctionalNet
from gpbridge.operators import WhitenedKernelOperator

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


INDICES = {"some": torch.tensor([3, 41, 0, 69, 20, 19]), "range": slice(18, 43)}


def check_partial_products(operator, dense, index):
    n = len(dense)
    own = torch.arange(n)[index]
    for k in (1, 40):
        V, U = random(n, k, seed=5), random(len(own), k, seed=6)
        got = partial_products.row_products(operator, index, V)
        torch.testing.assert_close(got, dense[own] @ V, **EXACT)
        got = partial_products.column_products(operator, index, U)
        torch.testing.assert_close(got, dense[:, own] @ U, **EXACT)
    got = partial_products.principal_block(operator, index)
    torch.testing.assert_close(got, dense[own][:, own], **EXACT)
    got = partial_products.dense_columns(operator, index)
    torch.testing.assert_close(got, dense[:, own], **EXACT)
    torch.testing.assert_close(
        partial_products.diagonal(operator), dense.diagonal(), **EXACT
    )
    exact = partial_products.exact_products(operator, V)
    torch.testing.assert_close(exact, dense @ V, **EXACT)
    bound = partial_products.smallest_eigenvalue(operator)
    assert bound <= torch.linalg.eigvalsh(dense)[0] + 1e-10


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_rows_columns_and_blocks_of_any_operator(index):
    root = random(70, 5)
    dense = root @ root.T + torch.eye(70, dtype=torch.float64)
    check_partial_products(dense, dense, index)
    operator = to_linear_operator(dense)
    check_partial_products(operator, dense, index)
    check_partial_products(
        operator.add_diagonal(torch.tensor(0.5)), dense + 0.5 * torch.eye(70), index
    )


@pytest.mark.parametrize("index", [torch.tensor([7, 0, 3]), slice(2, 9)])
def test_rows_columns_and_blocks_of_a_whitened_kernel(index):
    net = FunctionalNet(
        nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    )
    X = random(6, 2)
    net.probe(X)
    operator = WhitenedKernelOperator(X, random(6, 2, 2, seed=1), net=net)
    with torch.no_grad():
        dense = operator.to_dense()
        check_partial_products(operator, dense, index)
    assert partial_products.smallest_eigenvalue(operator) == 1.0
