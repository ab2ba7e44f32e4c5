"""Does a posterior over weights know what it does not know?

Networks learn the digits 0 to 4 from a few noisy images and are then shown the others,
5 to 9, which are none of their classes. Two questions: is the confidence in test images
of 0 to 4 the share of them that is right, and is the confidence in 5 to 9 lower?

All five networks come from one run. The first of them is the MAP network, all are the
deep ensemble, and trackers that watch the run make MultiSWAG of it. MC dropout trains a
network of its own, and the linearised posterior belongs to the first network. Scale of
SWAG, link and temperature of the linearised posterior are chosen on validation images.
The networks fit their few training images perfectly, which makes them overconfident.
"""

# %% Set up: digits with noise, so that there is something to be unsure of
import argparse
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from gpytorch.likelihoods import SoftmaxLikelihood
from matplotlib import pyplot
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from gpbridge import LinearizedGP, metrics
from gpbridge.dnn import SWAG, MCDropout, fit_ensemble, fit_map, tune_scale
from gpbridge.plots import COLORS, INK, plot_confidence_gap, plot_entropy_histograms
from gpbridge.weights import EmpiricalWeights, MixtureWeights

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--smoke", action="store_true", help="tiny sizes, for tests")
parser.add_argument("--figures", type=Path, default=Path(__file__).parent / "figures")
options = parser.parse_args()
epochs, num_members, num_draws, most = 100, 5, 50, 1000
scales = (0.25, 1.0, 4.0, 16.0, 64.0)
if options.smoke:
    epochs, num_members, num_draws, most, scales = 4, 2, 4, 60, (1.0, 4.0)

torch.set_num_threads(1)
torch.manual_seed(0)  # initial weights are torch's, which have no generator
generator = torch.Generator().manual_seed(0)
pixels, digits = (torch.tensor(part) for part in load_digits(return_X_y=True))
images = pixels.float() / 8 - 1
images = images + 0.6 * torch.randn(images.shape, generator=generator)
order = torch.randperm(len(digits), generator=generator)
known = order[digits[order] < 5]
other_X = images[digits > 4][:most]
train_rows, test_rows = known[:300], known[300:][:most]
X, y = images[train_rows], digits[train_rows]
test_X, test_y = images[test_rows], digits[test_rows]
held_out = torch.arange(100)  # of the 300: these only serve for choices

likelihood = SoftmaxLikelihood(num_classes=5, mixing_weights=False)


def mlp(*dropout):
    return nn.Sequential(
        *(nn.Linear(64, 50), nn.ReLU(), *dropout),
        *(nn.Linear(50, 50), nn.ReLU(), *dropout, nn.Linear(50, 5)),
    )


# %% Five networks in one run at a constant rate; trackers watch its second half
trackers = [SWAG(mlp(), rank=20) for _ in range(num_members)]


def watch(epoch, weights, entry):
    if epoch >= epochs // 2:
        for member, tracker in enumerate(trackers):
            tracker.update({name: value[member] for name, value in weights.items()})


training = {
    "epochs": epochs,
    "batch_size": 20,
    "weight_decay": 1e-3,
    "validation_rows": held_out,
    "early_stopping": False,
    "progress": False,
    "generator": generator,
}
fit = fit_ensemble(
    *(mlp(), X, y, num_members, likelihood),
    callback=watch,
    **training,
)
dropped = fit_map(mlp(nn.Dropout(0.3)), X, y, likelihood, **training)

# %% Posteriors
parts = []
for tracker in trackers:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tiny sizes have fewer snapshots than 20
        tuned = tune_scale(
            *(tracker, X[held_out], y[held_out], likelihood),
            scales=scales,
            generator=generator,
        )
    print(f"SWAG: scale {tuned.scale:g}")
    parts.append(tuned.posterior)
net = trackers[0].net
draws = {
    "MAP": EmpiricalWeights(net, fit.weights[:1]).draw(),
    "deep ensemble": EmpiricalWeights(net, fit.weights).draw(),
    "MultiSWAG": MixtureWeights(parts).draw(num_draws, generator),
    "MC dropout": MCDropout(dropped.network).draw(num_draws, generator),
}
model = LinearizedGP.from_fit(fit.member(0), X, y, likelihood, rows="fit")
calibration = model.calibrate(X[held_out], y[held_out])
print("LinearizedGP:", calibration or "the network's own softmax was no worse")

# %% Probabilities of the classes, averaged over draws, and their scores
predictions = {}
with torch.no_grad():
    for name, functions in draws.items():
        predictions[name] = [
            functions(inputs).softmax(-1).mean(0) for inputs in (test_X, other_X)
        ]
    predictions["LinearizedGP"] = [
        model.predict(inputs).probs.to(inputs) for inputs in (test_X, other_X)
    ]

is_other = torch.arange(len(test_X) + len(other_X)) >= len(test_X)
areas = {}
print(f"{'':26}accuracy    NLL    ECE  AUROC of 5 to 9")
for name, (inside, outside) in predictions.items():
    entropy = metrics.predictive_entropy(torch.cat([inside, outside]))
    areas[name] = metrics.auroc(entropy, is_other)
    print(
        f"{name:26}{metrics.accuracy(inside, test_y):8.3f}"
        f"{metrics.categorical_nll(inside, test_y):7.3f}"
        f"{metrics.expected_calibration_error(inside, test_y):7.3f}{areas[name]:7.3f}"
    )

# %% Confidence minus accuracy, and entropies of test images and of digits never seen
pyplot.rcParams.update(
    {"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "legend.fontsize": 8}
)
figure, axes = pyplot.subplots(
    2, 3, figsize=(11, 6.4), layout=None if options.smoke else "constrained"
)
first, *rest = axes.flat
for color, (name, (inside, _)) in zip((INK, *COLORS), predictions.items(), strict=True):
    plot_confidence_gap(first, {name: inside}, test_y, bins=8, color=color)
first.set(xlim=(0.4, 0.9997), ylim=(-0.25, 0.15))
first.set_xticks([], minor=True)
first.set_xticks(ticks := [0.5, 0.8, 0.95, 0.99, 0.998, 0.9995], map(str, ticks))
first.legend(frameon=False, loc="lower left")
first.set_title("Overconfident above zero", loc="left", fontweight="bold", fontsize=11)
for ax, (name, both) in zip(rest, predictions.items(), strict=True):
    plot_entropy_histograms(ax, *both, bins=16, labels=("0 to 4", "5 to 9, never seen"))
    title = f"{name}, AUROC {areas[name]:.2f}"
    ax.set_title(title, loc="left", fontweight="bold", fontsize=11)
top = max(ax.get_ylim()[1] for ax in rest)
for ax in rest:
    ax.set_ylim(0, top)

# %% Save
options.figures.mkdir(parents=True, exist_ok=True)
path = options.figures / "plot_calibration_ood.png"
figure.savefig(path, dpi=130)
Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)  # a third
print(f"figure: {path}")
