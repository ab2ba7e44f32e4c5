"""What does a run of SGD know about its own uncertainty, and what do the data add?

Data in three clusters leave two gaps. SWAG is the Gaussian of the iterates: its width
comes from the learning rate, a held-out scale mends the overall size, and the band is
as wide at the data as between them. Subspace inference takes the directions of the same
run, or random ones, and asks the likelihood which functions along them fit: the bands
are about twice as wide in the gaps as at the data along the principal directions, less
so along random ones. The held-out densities hardly differ, and none of the three doubts
itself enough outside of the data: ten directions of 5301 are not all the functions.

In the plane, the density comes from a grid and the samples from slices; their shares in
the regions should be those named. Slices mix slowly where, as here, the posterior is
far narrower than the prior: the R-hat that is printed says so.
"""

# %% Set up: data in clusters, and a network on the features x and x^2
import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from gpytorch.likelihoods import GaussianLikelihood
from matplotlib import pyplot
from PIL import Image
from torch import nn

from gpbridge.dnn import (
    SWAG,
    EllipticalSliceSampling,
    Subspace,
    VariationalInference,
    sample_subspace,
    tune_scale,
)
from gpbridge.dnn.point_likelihood import mixture_log_density
from gpbridge.dnn.subspace_likelihood import SubspaceLikelihood
from gpbridge.plots import (
    COLORS,
    INK,
    STYLE,
    plot_posterior_band,
    plot_subspace_density,
)

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--smoke", action="store_true", help="tiny sizes, for tests")
parser.add_argument("--figures", type=Path, default=Path(__file__).parent / "figures")
options = parser.parse_args()
epochs, steps, num_samples = (40, 5, 6) if options.smoke else (1000, 600, 100)
num_chains, grid_size = (2, 15) if options.smoke else (8, 61)

torch.set_num_threads(1)
torch.manual_seed(0)  # of the initial weights
generator = torch.Generator().manual_seed(0)
noise_variance, prior_std = 0.04, 5.0
clusters = (-1.4, -0.9), (-0.3, 0.2), (0.9, 1.3)


def truth(x):
    return 0.8 * torch.sin(3 * x) + 0.4 * x


def observe(x):
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return truth(x) + noise_variance**0.5 * noise


def inside(num_points, ends):
    share = torch.rand(num_points, 1, generator=generator, dtype=torch.float64)
    return ends[0] + (ends[1] - ends[0]) * share


X = torch.cat([inside(30, ends) for ends in clusters])
Y = observe(X)
X_val = torch.cat([inside(10, ends) for ends in clusters])
Y_val = observe(X_val)
x = torch.linspace(-2, 2, 161, dtype=X.dtype)[:, None]


class Squares(nn.Module):
    """A network on x and x^2, so that it can bend where there are no data."""

    def __init__(self, width=50):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()),
            *(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)),
        )

    def forward(self, x):
        return self.layers(torch.cat([x, x.square()], -1))


# %% Train by SGD, and let SWAG watch the second half
network = Squares().double()
optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=1e-4)
tracker = SWAG(network, rank=20)
for epoch in range(epochs):
    for rows in torch.randperm(len(X), generator=generator).split(18):
        optimizer.zero_grad()
        nn.functional.mse_loss(network(X[rows]), Y[rows]).backward()
        optimizer.step()
    if epoch >= epochs // 2 and epoch % max(1, epochs // 100) == 0:
        tracker.update(network)

# %% Three posteriors: SWAG, slices in its principal directions, VI in random ones
likelihood = GaussianLikelihood().double()
likelihood.noise = noise_variance
tuned = tune_scale(
    *(tracker, X_val, Y_val, likelihood, (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)),
    num_draws=10 if options.smoke else 200,
    generator=generator,
)
slices = EllipticalSliceSampling(num_samples, num_chains, burn_in=2 * num_samples)
common = {"prior_std": prior_std, "generator": generator, "progress": False}
principal = sample_subspace(
    *(Subspace.pca(tracker, 5), X, Y, likelihood), method=slices, **common
)
directions = Subspace.random(tracker.net, tracker.mean, 10, generator=generator)
random = sample_subspace(
    *(directions, X, Y, likelihood),
    method=VariationalInference(steps, full_covariance=True),
    **common,
)
plane = Subspace.pca(tracker, 2)
flat = sample_subspace(plane, X, Y, likelihood, method=slices, **common)
posteriors = {
    f"SWAG, scale {tuned.scale:g} by held-out data": tuned.posterior,
    "5 principal directions, slice sampling": principal.posterior,
    "10 random directions, variational": random.posterior,
}
gaps = (x > -0.9) & (x < -0.3) | (x > 0.2) & (x < 0.9)
x_gap = x[gaps][:, None]
y_gap = observe(x_gap)

# %% Left to right, top to bottom: the three of them as distributions over functions
pyplot.rcParams.update(STYLE)
figure, axes = pyplot.subplots(2, 2, figsize=(10.5, 7.2), layout="constrained")
near = torch.cat([(x > a) & (x < b) for a, b in clusters], 1).any(1)
for (title, posterior), ax, color in zip(
    posteriors.items(), axes.flat, COLORS, strict=False
):
    draws = posterior.draw(10 if options.smoke else 300, generator)
    with torch.no_grad():
        f = draws(x)[..., 0]
    mean, std = f.mean(0), f.std(0)
    print(
        f"{title}: standard deviation {std[near].mean():.3f} at the data, "
        f"{std[gaps[:, 0]].mean():.3f} in the gaps; held-out log density "
        f"{mixture_log_density(likelihood, draws, X_val, Y_val):.3f} at the data, "
        f"{mixture_log_density(likelihood, draws, x_gap, y_gap):.3f} in the gaps"
    )
    plot_posterior_band(ax, x, mean, std, color=color)
    ax.plot(x, f[:6].mT, color=color, linewidth=0.7, alpha=0.7)
    ax.plot(x, truth(x), color=INK, linewidth=1, linestyle=(0, (4, 3)), label="truth")
    ax.plot(X, Y, ".", color=INK, markersize=3, alpha=0.6, label="data")
    ax.set(xlim=(-2, 2), ylim=(-2.2, 2.6), xlabel="x", ylabel="f")
    ax.set_title(title, loc="left", fontweight="bold", fontsize=11)
    ax.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
print(
    f"{tracker.net.num_params} weights; slice sampling: R-hat up to "
    f"{principal.r_hat.max():.2f}, about "
    f"{principal.effective_sample_size.min():.0f} effective draws of "
    f"{num_samples * num_chains}, {principal.num_calls} calls"
)

# %% The plane of the first two principal directions: the density and its samples
target = SubspaceLikelihood(plane, X, Y, likelihood)
z = flat.samples.reshape(-1, 2)
low, high = z.min(0).values, z.max(0).values
margin = 0.15 * (high - low)
columns, rows = (
    torch.linspace(float(a), float(b), grid_size, dtype=X.dtype)
    for a, b in zip(low - margin, high + margin, strict=True)
)
points = torch.cartesian_prod(rows, columns).flip(-1)
with torch.no_grad():
    values = torch.cat([target(part) for part in points.split(200)])
log_density = values - 0.5 * points.square().sum(-1) / prior_std**2
ax = plot_subspace_density(
    axes[1, 1],
    *(columns, rows, log_density.reshape(grid_size, grid_size)),
    samples=z[:: max(1, len(z) // 200)],
    colors=(COLORS[3], INK),
)
ax.set(xlabel="first principal direction", ylabel="second principal direction")
ax.set_title(
    "Posterior density in a plane: 50, 80, 95%", loc="left", fontweight="bold",
    fontsize=11,
)  # fmt: skip

# %% Save
options.figures.mkdir(parents=True, exist_ok=True)
path = options.figures / "plot_swag_vs_subspace.png"
figure.savefig(path, dpi=110)
Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)  # a third
print(f"figure: {path}, {path.stat().st_size // 1000} kB")
