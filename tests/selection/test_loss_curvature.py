"""Curvature of a loss by products: dense oracles by plain autodiff."""

import pytest
import torch
from torch.autograd.functional import hessian, jacobian
from torch.nn import functional as F

from gpbridge.selection import CompositeLoss
from gpbridge.selection.loss_curvature import CurvatureOperator, flatten, mixed_product

X = torch.linspace(-1, 1, 12).reshape(6, 2).double()
Y = torch.tensor([0, 1, 2, 0, 1, 2])
PARAMS = {
    "inner": torch.linspace(-1, 1, 6).reshape(2, 3).double(),
    "outer": torch.linspace(0.5, -1, 9).reshape(3, 3).double(),
}
HPARAMS = {"log_decay": torch.tensor(-1.0).double()}


def outputs(params, hparams, batch=None):
    x = X if batch is None else batch[0]
    return torch.tanh(x @ params["inner"]) @ params["outer"]


def loss(f, params, hparams, batch=None):
    y = Y if batch is None else batch[1]
    squares = sum(p.square().sum() for p in params.values())
    return F.cross_entropy(f, y) + 0.5 * hparams["log_decay"].exp() * squares


LOSS = CompositeLoss(outputs, loss)
THETA = flatten(PARAMS)


def named(theta):
    return {"inner": theta[:6].reshape(2, 3), "outer": theta[6:].reshape(3, 3)}


def dense(curvature):
    if curvature == "hessian":
        return hessian(lambda t: LOSS(named(t), HPARAMS), THETA)
    J = jacobian(lambda t: outputs(named(t), HPARAMS), THETA).reshape(18, 15)
    f = outputs(PARAMS, HPARAMS)
    middle = hessian(lambda f: F.cross_entropy(f, Y), f).reshape(18, 18)
    return J.mT @ middle @ J + HPARAMS["log_decay"].exp() * torch.eye(15).double()


def operator(curvature, damping=0.0, batches=None):
    return CurvatureOperator(
        THETA,
        torch.tensor(damping).double(),
        like=PARAMS,
        hparams=HPARAMS,
        loss=LOSS,
        curvature=curvature,
        batches=batches,
    )


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_products_are_those_of_the_dense_matrix(curvature, batched):
    rows = torch.arange(6).split(4)
    batches = [(X[i], Y[i]) for i in rows] if batched else None
    H = operator(curvature, batches=batches)
    exact = dense(curvature)
    assert H.shape == (15, 15)
    torch.testing.assert_close(H @ torch.eye(15).double(), exact)
    torch.testing.assert_close(H @ THETA, exact @ THETA)
    damped = operator(curvature, 0.3, batches) @ torch.eye(15).double()
    torch.testing.assert_close(damped, exact + 0.3 * torch.eye(15).double())


def test_the_gauss_newton_matrix_is_positive_where_the_hessian_is_not():
    one = CompositeLoss(
        lambda p, h: 3 * torch.tanh(p["w"]) ** 2, lambda f, p, h: (f - 4).square().sum()
    )
    w = {"w": torch.tensor([0.1]).double()}
    values = [
        CurvatureOperator(
            w["w"], w["w"].new_zeros(()), like=w, hparams=w, loss=one, curvature=kind
        ).to_dense()
        for kind in ("hessian", "ggn")
    ]
    assert values[0] < 0 < values[1]


@pytest.mark.parametrize("batched", [False, True])
def test_the_mixed_product_is_that_of_the_dense_mixed_derivative(batched):
    rows = torch.arange(6).split(4)
    batches = [(X[i], Y[i]) for i in rows] if batched else None
    direction = {k: torch.cos(p) for k, p in PARAMS.items()}
    (found,) = mixed_product(LOSS, PARAMS, HPARAMS, direction, batches)
    # The decay's gradient in the weights is exp(log_decay) w.
    expected = HPARAMS["log_decay"].exp() * (flatten(direction) @ THETA)
    torch.testing.assert_close(found, expected)


def test_a_loss_that_is_linear_has_no_curvature():
    w = {"w": torch.ones(3).double()}
    H = CurvatureOperator(
        w["w"],
        w["w"].new_zeros(()),
        like=w,
        hparams=w,
        loss=lambda p, h: p["w"].sum(),
    )
    assert not (H @ torch.ones(3, 2).double()).any()
    (found,) = mixed_product(lambda p, h: p["w"].sum(), w, w, w)
    assert found is None
