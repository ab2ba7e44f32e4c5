"""What is gained by telling an autoencoder which object it sees, and at which angle?

Handwritten threes are turned full circle in steps, and of every object a quarter of the
circle is held out. A plain VAE takes its images for independent. With a Gaussian
process prior, latent rows of one object at near angles are correlated: the kernel is a
product of learnt object vectors and a periodic kernel of the angle. It then predicts an
image from the object and the angle alone.

Scores are held-out log densities in nats per image, by importance sampling with the
encoder's help, so that both are lower bounds: log p(y) of the plain VAE under its
standard normal prior, log p(y | object, angle, training images) with the process.
"""

# %% Set up: images from the 8 x 8 digits that ship with scikit-learn
import argparse
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from gpytorch.kernels import LinearKernel, PeriodicKernel
from matplotlib import pyplot
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from gpbridge.dnn import VAE, GPPriorVAE, fit_gp_vae, fit_vae
from gpbridge.plots import COLORS, INK

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--smoke", action="store_true", help="tiny sizes, for tests")
parser.add_argument("--figures", type=Path, default=Path(__file__).parent / "figures")
parser.add_argument("--epochs", type=int, help="default 100")
parser.add_argument("--seeds", type=int, default=3)
options = parser.parse_args()
num_objects, num_importance = (6, 10) if options.smoke else (40, 1000)
epochs = options.epochs or (2 if options.smoke else 100)
size, num_angles, latent_dim, vector_dim, num_inducing = 16, 16, 8, 8, 32

torch.set_num_threads(1)
digits = load_digits()
threes = torch.tensor(digits.images[digits.target == 3][:num_objects] / 16).float()
angles = torch.arange(num_angles) * 2 * math.pi / num_angles
objects = torch.arange(num_objects).repeat_interleave(num_angles)
turns = angles.repeat(num_objects)
X = torch.stack([objects.float(), turns], -1)  # what is known about each image


def rotated(images, angle):
    """Upsample, shrink so that no corner is lost, and turn."""
    large = F.interpolate(images[:, None], scale_factor=4, mode="bicubic").clamp(0, 1)
    cos, sin, zero = 1.3 * angle.cos(), 1.3 * angle.sin(), 0 * angle
    rows = [torch.stack([cos, -sin, zero], -1), torch.stack([sin, cos, zero], -1)]
    shape = (len(images), 1, size, size)
    grid = F.affine_grid(torch.stack(rows, -2), shape, align_corners=False)
    return F.grid_sample(large, grid, align_corners=False).flatten(1)


Y = rotated(threes[objects], turns)


def held_out_quarters(generator):
    """One arc of each object, as a mask over the images."""
    start = torch.randint(num_angles, (num_objects, 1), generator=generator)
    step = (torch.arange(num_angles) - start) % num_angles
    return (step < num_angles // 4).flatten()


# %% The models: the same encoder, decoder and noise model in both
def networks():
    encoder = nn.Sequential(
        nn.Linear(size**2, 128), nn.ELU(), nn.Linear(128, 64), nn.ELU(),
        nn.Linear(64, 2 * latent_dim),
    )  # fmt: skip
    decoder = nn.Sequential(
        nn.Linear(latent_dim, 64), nn.ELU(), nn.Linear(64, 128), nn.ELU(),
        nn.Linear(128, size**2),
    )  # fmt: skip
    return encoder, decoder


class ObjectVectors(nn.Module):
    """From (object, angle) to (learnt vector, angle), the inputs of the kernel."""

    def __init__(self):
        super().__init__()
        self.vectors = nn.Embedding(num_objects, vector_dim)
        nn.init.normal_(self.vectors.weight, std=vector_dim**-0.5)

    def forward(self, X):
        return torch.cat([self.vectors(X[:, 0].long()), X[:, 1:]], -1)


def gp_prior_vae(generator):
    of_objects = LinearKernel(active_dims=list(range(vector_dim)))
    of_objects.variance = 1.0
    of_objects.raw_variance.requires_grad_(False)  # the vectors have a length already
    of_angles = PeriodicKernel(active_dims=[vector_dim])
    of_angles.period_length, of_angles.lengthscale = 2 * math.pi, 1.0
    of_angles.raw_period_length.requires_grad_(False)
    vectors = torch.randn(num_inducing, vector_dim, generator=generator)
    where = 2 * math.pi * torch.rand(num_inducing, 1, generator=generator)
    points = torch.cat([vectors * vector_dim**-0.5, where], -1)
    return GPPriorVAE(
        *networks(), latent_dim, of_objects * of_angles, points,
        embedding=ObjectVectors(),
    )  # fmt: skip


# %% Fit both on three quarters of each circle, score on the rest
scores, errors = [], []
fit = {"epochs": epochs, "batch_size": 80, "learning_rate": 2e-3}
for seed in range(1 if options.smoke else options.seeds):
    torch.manual_seed(seed)  # initial weights are torch's, which have no generator
    generator = torch.Generator().manual_seed(seed)
    held_out = held_out_quarters(generator)
    train_X, train_Y = X[~held_out], Y[~held_out]
    test_X, test_Y = X[held_out], Y[held_out]
    vae = fit_vae(
        VAE(*networks(), latent_dim), train_Y, generator=generator, **fit
    ).model
    process = fit_gp_vae(
        gp_prior_vae(generator), train_X, train_Y, generator=generator, **fit
    ).model
    plain = vae.log_likelihood(test_Y, num_importance, generator).mean()
    known = process.log_likelihood(test_X, test_Y, num_importance, generator).mean()
    scores.append((float(plain), float(known)))
    print(f"seed {seed}: nats per held-out image, plain VAE {plain:.1f}, ", end="")
    print(f"Gaussian process prior {known:.1f}, difference {known - plain:.1f}")
    if seed == 0:
        shown = vae, process, held_out


# %% What either predicts on the held-out quarter, without its images
def between_neighbours(vae, held_out):
    """Decoded latent rows, linear between the ends of each gap."""
    latent = vae.encode(Y).mean.reshape(num_objects, num_angles, -1).clone()
    gap = held_out.reshape(num_objects, num_angles)
    for i in range(num_objects):
        first = int((gap[i] & ~gap[i].roll(1)).nonzero())
        length = int(gap[i].sum())
        left, right = latent[i, first - 1], latent[i, (first + length) % num_angles]
        for k in range(length):
            share = (k + 1) / (length + 1)
            latent[i, (first + k) % num_angles] = left.lerp(right, share)
    return vae.decode(latent.flatten(0, 1)).mean


vae, process, held_out = shown
with torch.no_grad():
    strips = {
        "true": Y,
        "process": process.predict(X, generator=generator).mean,
        "plain": between_neighbours(vae, held_out),
    }
for name in ("process", "plain"):
    error = (strips[name] - Y)[held_out].square().mean().sqrt()
    print(f"{name}: root mean square error of a held-out pixel {error:.3f}")

# %% Left: two objects on their way around. Right: the scores
pyplot.rcParams.update({"font.size": 10, "text.color": INK, "axes.labelcolor": INK})
figure = pyplot.figure(figsize=(11.5, 4.4), layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=[3.4, 1])
labels = ["true", "GP prior:\nobject, angle", "plain VAE:\nbetween ends"]
for ax, i in zip(left.subplots(2, 1), (0, num_objects // 2), strict=True):
    place = slice(i * num_angles, (i + 1) * num_angles)
    rows = [images[place].reshape(-1, size, size) for images in strips.values()]
    tiles = torch.cat([F.pad(torch.cat(list(row), -1), (0, 0, 1, 1)) for row in rows])
    ax.imshow(tiles, cmap="gray_r", vmin=0, vmax=1)
    for column in held_out[place].nonzero().flatten().tolist():
        corner = (column * size - 0.5, -0.5)
        frame = pyplot.Rectangle(corner, size, len(tiles), fill=False, clip_on=False)
        frame.set(edgecolor=COLORS[2], linewidth=1.6)
        ax.add_patch(frame)
    centres = (torch.arange(3) + 0.5) * (size + 2)
    ax.set_yticks(centres, labels, fontsize=9)
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
left.suptitle(
    "Two of the objects; framed angles were held out", fontweight="bold", fontsize=11
)
ax = right.subplots()
for pair in scores:
    ax.plot([0, 1], pair, color="#b8bdc6", linewidth=1.2, zorder=1)
    ax.scatter([0, 1], pair, c=[COLORS[1], COLORS[0]], s=42, zorder=2)
ax.set(xlim=(-0.4, 1.4), xticks=[0, 1], xticklabels=["plain\nVAE", "GP prior\nVAE"])
ax.set_ylabel("held-out log density, nats per image")
ax.set_title("A line per seed", fontweight="bold", fontsize=11)
ax.spines[["top", "right"]].set_visible(False)
ax.grid(axis="y", color="#e6e8ec")
ax.set_axisbelow(True)

# %% Save
options.figures.mkdir(parents=True, exist_ok=True)
path = options.figures / "plot_gp_vae.png"
figure.savefig(path, dpi=130)
Image.open(path).convert("RGB").quantize(256, kmeans=1).save(
    path, optimize=True
)  # a third
print(f"figure: {path}")
