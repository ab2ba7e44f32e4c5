"""What has been seen of a system becomes functions: draws of a posterior, or its mean.

In: inputs (encoded state, action) and changes of the state. Out: frozen functions for
a planner, s of them that are possible, or one that is likely. Models: one SingleTaskGP
for each entry of the state, whose sample paths have Fourier features of their own, and
a small network, linearised, of several outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from botorch import fit_gpytorch_mll
from botorch.models import ModelListGP, SingleTaskGP
from botorch.models.transforms import Normalize, Standardize
from gpytorch.mlls import SumMarginalLogLikelihood
from torch import Generator, Tensor, nn

from gpbridge import LinearizedGP
from gpbridge.draws import TangentDraws
from gpbridge.pathwise import PosteriorDraw, condition, draw_prior
from gpbridge.surrogates import LinearizedSurrogate

MANY = 4096  # draws whose mean stands for the posterior's: off by 1/64 of its spread


class Outputs(nn.Module):
    """Functions of one output each, side by side."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    @property
    def num_samples(self) -> int:
        return self.parts[0].num_samples

    def forward(self, X: Tensor) -> Tensor:
        return torch.cat([part(X) for part in self.parts], -1)

    def each(self, X: Tensor) -> Tensor:
        return torch.cat([part.each(X) for part in self.parts], -1)


class PosteriorMean(nn.Module):
    """The mean of a Gaussian process as one function, without its covariance."""

    num_samples = 1

    def __init__(self, model: SingleTaskGP) -> None:
        super().__init__()
        self.model = model.eval()
        self.Z = model.train_inputs[0]  # transformed, in eval mode
        covariance = model.likelihood(model.forward(self.Z)).covariance_matrix
        misfit = model.train_targets - model.mean_module(self.Z)
        self.weights = torch.linalg.solve(covariance, misfit[:, None])

    def each(self, X: Tensor) -> Tensor:
        model, Z = self.model, self.model.input_transform(X)
        K = model.covar_module(Z, self.Z).to_dense()
        values = K @ self.weights + model.mean_module(Z)[..., None]
        return model.outcome_transform.untransform(values)[0]

    def forward(self, X: Tensor) -> Tensor:
        return self.each(X[None])


def draw_gp(
    model: SingleTaskGP, num: int, generator: Generator, num_features: int = 256
) -> PosteriorDraw:
    """Sample paths of a fitted GP, in the units of its data."""
    Z = model.eval().train_inputs[0]  # transformed, in eval mode
    prior = draw_prior(
        model.covar_module,
        Z.shape[-1],
        num,
        num_features=num_features,
        generator=generator,
    )
    paths = condition(
        prior,
        Z,
        model.train_targets,
        model.likelihood.noise,
        mean=model.mean_module,
        generator=generator,
    )
    paths.input_transform = model.input_transform
    paths.outcome_transform = model.outcome_transform
    return paths


class GaussianProcesses:
    """One SingleTaskGP with botorch's defaults for each entry of the state."""

    name = "GP"

    def fit(self, X: Tensor, Y: Tensor, seed: int) -> ModelListGP:
        d = X.shape[-1]
        model = ModelListGP(
            *(
                SingleTaskGP(
                    X,
                    y,
                    input_transform=Normalize(d),
                    outcome_transform=Standardize(1),
                )
                for y in Y.split(1, -1)
            )
        )
        fit_gpytorch_mll(SumMarginalLogLikelihood(model.likelihood, model))
        return model.requires_grad_(False)

    def draw(self, model: ModelListGP, num: int, generator: Generator) -> Outputs:
        return Outputs([draw_gp(one, num, generator) for one in model.models])

    def mean(self, model: ModelListGP) -> Outputs:
        return Outputs([PosteriorMean(one) for one in model.models])


def small_network(num_inputs: int, num_outputs: int) -> nn.Module:
    """Two layers of 24 tanh: few enough weights for evidence in weight space."""
    return nn.Sequential(
        *(nn.Linear(num_inputs, 24), nn.Tanh()),
        *(nn.Linear(24, 24), nn.Tanh()),
        nn.Linear(24, num_outputs),
    )


class LinearizedNetworks:
    """A network trained on all entries of the state, linearised, fitted by evidence."""

    name = "linearised network"

    def fit(self, X: Tensor, Y: Tensor, seed: int) -> LinearizedGP:
        recipe = LinearizedSurrogate(network=small_network, seed=seed)
        return recipe.fit(X, Y)

    def draw(self, model: LinearizedGP, num: int, generator: Generator) -> TangentDraws:
        return model.draw(num, generator)

    def mean(self, model: LinearizedGP) -> TangentDraws:
        draws = model.draw(MANY, torch.Generator().manual_seed(0))
        draws.change = draws.change.mean(0, keepdim=True)
        return draws


MODELS = {model.name: model for model in (GaussianProcesses(), LinearizedNetworks())}
