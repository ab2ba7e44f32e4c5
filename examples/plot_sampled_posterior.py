"""Do samples by iterative solvers match the exact posterior, and after how many passes?

A sample of a Gaussian process posterior is a prior sample that a linear solve pulls to
the data. The solve need not be exact: with s samples a standard deviation is known to a
relative (2 s)^-1/2 anyway, so that the solver may stop where its own error is below
that. A pass is one look at all n x n entries of the kernel matrix, none of them held.

One input is the easy case of conjugate gradients: the kernel matrix has few large
eigenvalues, so that a preconditioner of rank 100 leaves little to do. With more inputs
and little noise it is not so.
"""

# %% Set up: many noisy data with a gap, and a kernel whose hyperparameters are known
import argparse
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from botorch.models import SingleTaskGP
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from matplotlib import pyplot
from PIL import Image

from gpbridge import SampledGP
from gpbridge.checks import NotConvergedWarning
from gpbridge.pathwise import condition, draw_prior
from gpbridge.plots import COLORS, INK, STYLE, plot_posterior_band
from gpbridge.solvers import (
    AlternatingProjections,
    Cholesky,
    ConjugateGradients,
    SketchAndProject,
    StochasticDualDescent,
)

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--smoke", action="store_true", help="tiny sizes, for tests")
parser.add_argument("--figures", type=Path, default=Path(__file__).parent / "figures")
options = parser.parse_args()
n, passes, num_samples = (200, 5, 8) if options.smoke else (1000, 100, 64)

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def truth(x):
    return torch.sin(4 * x) + 0.5 * x


noise_variance = 0.25
X = 2 * torch.rand(n, 1, generator=generator, dtype=torch.float64)
X = torch.where(X < 1, X - 2, X - 0.5).sort(0).values  # none between -1 and 0.5
Y = truth(X) + noise_variance**0.5 * normal(n, 1)
x = torch.linspace(-2.5, 2, 301, dtype=X.dtype)[:, None]

kernel = ScaleKernel(MaternKernel(1.5)).double()
kernel.outputscale, kernel.base_kernel.lengthscale = 1.0, 0.5
likelihood = GaussianLikelihood().double()
likelihood.noise = noise_variance

# %% Left: mean, two standard deviations and some draws, beside the exact posterior
exact = SingleTaskGP(
    X, Y, likelihood=likelihood, covar_module=kernel, outcome_transform=None
)
exact.mean_module.initialize(constant=0.0)
solver = SketchAndProject(tolerance=1e-2, block_size=100)
sampled = SampledGP(X, Y, kernel, likelihood, solver, num_samples)
with torch.no_grad():
    f, g = exact.posterior(x), sampled.posterior(x)
    std, sample_std = f.variance.sqrt(), g.variance.sqrt()
    draws = sampled.draw(5, generator)(x)[..., 0]
print(sampled)
ratio = sample_std / std
print(
    f"means differ by at most {(g.mean - f.mean).abs().max() / std.max():.3f} of the "
    f"largest standard deviation; standard deviations by a factor of {ratio.min():.2f} "
    f"to {ratio.max():.2f}, and {num_samples} samples scatter by "
    f"{(2 * num_samples) ** -0.5:.2f}"
)

pyplot.rcParams.update(STYLE)
figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
left.plot(X[::5], Y[::5], ".", color="#b8bdc6", markersize=3, label="data, a fifth")
plot_posterior_band(left, x, f.mean, std, color=COLORS[0], label="exact mean")
left.plot(x, draws.mT, color=COLORS[1], linewidth=0.8, alpha=0.8)
for sign in (-2, 2):
    label = "samples: 95% interval, and five draws" if sign > 0 else None
    edge = g.mean + sign * sample_std
    left.plot(x, edge, color=COLORS[1], linestyle="--", linewidth=1.4, label=label)

# %% Right: the same prior draws and noise, pulled to the data by each solver in turn
prior = draw_prior(kernel, 1, num_samples, generator=torch.Generator().manual_seed(1))


def pulled(solver):
    seed = torch.Generator().manual_seed(2)  # of the noise
    return condition(prior, X, Y, noise_variance, solver, generator=seed)


solvers = {
    "stochastic dual descent": (
        StochasticDualDescent,
        {"max_passes": passes, "batch_size": 100},
    ),
    "sketch and project": (SketchAndProject, {"max_passes": passes, "block_size": 100}),
    "alternating projections": (
        AlternatingProjections,
        {"max_passes": passes, "block_size": 100},
    ),
    "conjugate gradients": (ConjugateGradients, {"max_iterations": passes}),
}
with torch.no_grad():
    K, target = kernel(x, X).to_dense(), pulled(Cholesky()).weights.flatten(1)


def error(weights):
    """Root mean square over points and draws, in posterior standard deviations."""
    off = K @ (weights - target)
    return float((off.square().mean(-1) / f.variance[:, 0]).mean().sqrt())


good_enough = (2 * num_samples) ** -0.5
for color, (name, (kind, given)) in zip(COLORS, solvers.items(), strict=True):
    seen = [(0, error(0 * target))]

    def watch(progress, seen=seen):
        seen.append((progress.passes, error(progress.value)))

    with warnings.catch_warnings():  # they are stopped, not done
        warnings.simplefilter("ignore", NotConvergedWarning)
        pulled(kind(tolerance=1e-9, callback=watch, **given))
    right.plot(*zip(*seen, strict=True), color=color, linewidth=1.8, label=name)
    below = [f"{at:.3g}" for at, size in seen if size < good_enough]
    print(
        f"{name}: below the scatter of the samples after passes:",
        *below[:1] or ["never"],
    )
label = f"scatter of {num_samples} samples"
right.axhline(good_enough, color=INK, linewidth=1.2, linestyle=":", label=label)

# %% Save
left.set(xlim=(-2.5, 2), ylim=(-3.6, 4.8), xlabel="x", ylabel="f")
left.set_title(
    f"{n} points, {num_samples} samples", loc="left", fontweight="bold", fontsize=11
)
left.legend(frameon=False, loc="upper left", fontsize=8)
right.set(xscale="symlog", yscale="log", xlim=(0, passes), ylim=(1e-6, 3e3))
right.set(
    xlabel="passes over the kernel matrix", ylabel="error of a draw / posterior std"
)
right.set_title(
    "Distance from the exact draws", loc="left", fontweight="bold", fontsize=11
)
right.grid(True)
right.legend(frameon=False, loc="upper right", fontsize=8, ncols=2)
options.figures.mkdir(parents=True, exist_ok=True)
path = options.figures / "plot_sampled_posterior.png"
figure.savefig(path, dpi=130)
Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)  # a third
print(f"figure: {path}")
