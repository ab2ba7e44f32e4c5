import sys

import pytest
import torch
from botorch.exceptions.errors import InputDataError

from gpbridge.checks import ShapeError
from gpbridge.dnn import CurveLosses, LossPlane
from gpbridge.metrics import expected_calibration_error, reliability_curve
from gpbridge.plots import (
    plot_confidence_gap,
    plot_entropy_histograms,
    plot_evidence_history,
    plot_loss_along,
    plot_loss_plane,
    plot_posterior_band,
    plot_reliability,
    plot_subspace_density,
    plot_trace,
)

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
pyplot = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture
def ax():
    axes = pyplot.subplots()[1]
    yield axes
    pyplot.close("all")


def probabilities(n=50):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (n,), generator=generator)
    return torch.randn(n, 3, generator=generator).softmax(-1), labels


def along(*losses):
    values = torch.tensor(losses)
    t = torch.linspace(0, 1, len(values))
    return CurveLosses(t, values, values / 10, t)


def bowl(size=15):
    x, y = torch.linspace(-2, 2, size), torch.linspace(-1, 3, size + 2)
    loss = x.square() + (y[:, None] - 1).square()
    points = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    return LossPlane(x, y, loss, None, points)


def normal_density(size=81):
    x = torch.linspace(-5, 5, size)
    return x, x, -0.5 * (x.square() + x[:, None].square())


def draw_all(ax):
    x = torch.linspace(1, 0, 5, requires_grad=True)
    plot_posterior_band(ax, x, x[:, None], x, train_x=x, train_y=x)
    plot_reliability(ax, reliability_curve(*probabilities()), label="MAP")
    plot_trace(ax, torch.ones(2, 5), target=1.0, label="runs")
    plot_evidence_history(ax, updates())
    plot_loss_along(ax, {"line": along(0.0, 3.0, 1.0), "curve": along(0.0, 1.0)})
    plot_loss_plane(ax, bowl(), trajectory=bowl().points, labels=("start", ""))
    plot_subspace_density(ax, *normal_density(), samples=torch.zeros(3, 2))
    plot_confidence_gap(ax, probabilities()[0], probabilities()[1])
    plot_entropy_histograms(ax, probabilities()[0], probabilities(9)[0])


def test_plots_return_the_axes_that_they_drew_into(ax):
    x = torch.arange(4.0)
    assert plot_posterior_band(ax, x, x, x) is ax
    assert plot_reliability(ax, reliability_curve(*probabilities())) is ax
    assert plot_trace(ax, x) is ax
    assert plot_evidence_history(ax, updates()) is ax
    assert plot_loss_along(ax, along(1.0, 2.0)) is ax
    assert plot_loss_plane(ax, bowl()) is ax
    assert plot_subspace_density(ax, *normal_density()) is ax
    assert plot_confidence_gap(ax, *probabilities()) is ax
    assert plot_entropy_histograms(ax, *2 * probabilities()[:1]) is ax


def test_plots_neither_show_nor_change_the_global_style(ax, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("show was called")

    monkeypatch.setattr(pyplot, "show", refuse)
    before = dict(matplotlib.rcParams)
    draw_all(ax)
    ax.figure.canvas.draw()
    assert dict(matplotlib.rcParams) == before


def test_the_band_is_two_standard_deviations_wide_at_sorted_inputs(ax):
    x, mean = torch.tensor([2.0, 0.0, 1.0]), torch.tensor([5.0, 3.0, 4.0])
    plot_posterior_band(ax, x, mean, torch.full((3,), 0.5))
    (line,) = ax.get_lines()
    assert line.get_xdata().tolist() == [0, 1, 2]
    assert line.get_ydata().tolist() == [3, 4, 5]
    vertices = ax.collections[0].get_paths()[0].vertices
    assert vertices[:, 1].min() == 2.0 and vertices[:, 1].max() == 6.0


def test_the_legend_names_the_calibration_error(ax):
    curve = reliability_curve(*probabilities())
    plot_reliability(ax, curve, label="MAP")
    (entry,) = ax.get_legend().get_texts()
    error = float(expected_calibration_error(*probabilities()))
    assert entry.get_text() == f"MAP, ECE {error:.3f}"


def test_a_trace_of_several_runs_is_their_median(ax):
    runs = torch.tensor([[0.0, 1.0], [5.0, 2.0], [1.0, 9.0]])
    plot_trace(ax, runs, first_step=1)
    (line,) = ax.get_lines()
    assert line.get_xdata().tolist() == [1, 2]
    assert line.get_ydata().tolist() == [1.0, 2.0]


def updates():
    """History of a run with two updates of its hyperparameters."""
    return {
        "loss": torch.ones(20),
        "epoch": torch.tensor([15, 20]),
        "evidence": torch.tensor([-9.0, -7.0]),
        "fit": torch.tensor([-5.0, -4.0]),
        "complexity": torch.tensor([4.0, 3.0]),
    }


def test_an_evidence_history_is_drawn_over_its_epochs(ax):
    plot_evidence_history(ax, updates())
    fit, evidence = ax.get_lines()
    assert evidence.get_xdata().tolist() == fit.get_xdata().tolist() == [15.0, 20.0]
    assert evidence.get_ydata().tolist() == [-9.0, -7.0]
    assert [t.get_text() for t in ax.texts] == ["complexity 3"]
    with pytest.raises(ValueError, match="no epoch, evidence, fit, complexity, only l"):
        plot_evidence_history(ax, {"loss": torch.ones(3)})


def test_losses_along_paths_are_drawn_with_their_barriers(ax):
    plot_loss_along(ax, {"line": along(1.0, 5.0, 2.0), "curve": along(1.0, 1.2, 2.0)})
    first, second = ax.get_lines()
    assert first.get_ydata().tolist() == [1.0, 5.0, 2.0]
    assert first.get_color() != second.get_color()
    names = [entry.get_text() for entry in ax.get_legend().get_texts()]
    assert names == ["line, barrier 3.5", "curve, barrier 0.5"]
    ax.clear()
    plot_loss_along(ax, along(1.0, 5.0, 2.0), quantity="error")
    torch.testing.assert_close(ax.get_lines()[0].get_ydata()[1].item(), 0.5)


def test_a_plane_is_drawn_with_its_path_and_named_points(ax):
    path = torch.tensor([[0.0, 1.0], [0.5, 0.4], [1.0, 0.0]])
    plane = bowl()
    plot_loss_plane(ax, plane, trajectory=path, labels=("start", ""), highest=4.0)
    line, marker = ax.get_lines()
    assert torch.equal(torch.tensor(line.get_xydata()).float(), path)
    assert marker.get_xydata().tolist() == [[0.0, 1.0]]
    assert [text.get_text() for text in ax.texts] == ["start"]
    assert ax.get_aspect() == 1.0
    levels = ax.collections[0].levels
    assert levels[0] == plane.loss.min() and levels[-1] == pytest.approx(4.0)
    ratios = (levels[2:] - levels[0]) / (levels[1:-1] - levels[0])
    assert ratios == pytest.approx([ratios[0]] * len(ratios))


def test_a_plane_with_infinite_losses_is_drawn(ax):
    plane = bowl()
    plane.loss[0, 0], plane.loss[-1, -1] = torch.nan, torch.inf
    plot_loss_plane(ax, plane)
    ax.figure.canvas.draw()


def test_regions_of_a_density_hold_their_mass_of_samples(ax):
    x, y, log_density = normal_density()
    samples = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    plot_subspace_density(ax, x, y, log_density - 300, samples=samples)
    assert len(ax.get_lines()[0].get_xdata()) == 4000
    radii = []
    for path in ax.collections[1].get_paths():
        radii.append(abs(path.vertices).max())  # of a standard normal, a circle
    assert len(radii) == 3
    for radius, mass in zip(sorted(radii), (0.5, 0.8, 0.95), strict=True):
        inside = (samples.norm(dim=-1) < radius).double().mean()
        assert abs(float(inside) - mass) < 0.03


def test_the_confidence_gap_is_that_of_bins_of_equal_mass(ax):
    values, labels = probabilities(200)
    plot_confidence_gap(ax, {"MAP": values, "SWAG": values}, labels)
    _, first, second = ax.get_lines()
    curve = reliability_curve(values, labels, 20, equal="mass")
    gap = (curve.confidence - curve.accuracy).tolist()
    assert first.get_ydata().tolist() == pytest.approx(gap)
    assert first.get_xdata().tolist() == pytest.approx(curve.confidence.tolist())
    error = float(expected_calibration_error(values, labels, 20, equal="mass"))
    entry = ax.get_legend().get_texts()[0].get_text()
    assert entry == f"MAP, ECE {error:.3f}"
    # Equal steps on the axis are equal factors of the doubt.
    place = ax.xaxis.get_transform().transform
    steps = place([0.9, 0.99, 0.999])
    assert steps[1] - steps[0] == pytest.approx(steps[2] - steps[1])


def test_full_confidence_is_drawn_at_the_end_of_the_axis(ax):
    plot_confidence_gap(ax, torch.eye(2)[[0, 0, 1]], torch.tensor([0, 0, 0]))
    ax.figure.canvas.draw()
    assert ax.get_xlim()[1] < 1


def test_histograms_of_entropies_are_densities(ax):
    certain, guess = torch.eye(3)[:2], torch.full((4, 3), 1 / 3)
    plot_entropy_histograms(ax, certain, guess, bins=10)
    inside, _, outside, _ = (patch.get_data() for patch in ax.patches)
    width = torch.tensor(3.0).log().item() / 10
    assert (
        inside.values[0] * width == pytest.approx(1.0) and inside.values[1:].sum() == 0
    )
    assert outside.values[-1] * width == pytest.approx(1.0)
    assert [entry.get_text() for entry in ax.get_legend().get_texts()] == [
        "in distribution, mean 0.00",
        "out of distribution, mean 1.10",
    ]


def test_no_axes_means_a_new_figure():
    ax = plot_trace(None, torch.arange(3.0))
    assert ax.figure.axes == [ax]
    pyplot.close(ax.figure)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "gpbridge\[plots\]"'):
        plot_trace(None, torch.arange(3.0))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda ax: plot_posterior_band(ax, torch.ones(3), torch.ones(3, 2), None),
            TypeError,
            "std must be a torch.Tensor",
        ),
        (
            lambda ax: plot_posterior_band(
                ax, torch.ones(3), torch.ones(3, 2), torch.ones(3)
            ),
            ShapeError,
            r"mean must be ``n`` or ``n x 1``, but has shape \(3, 2\)",
        ),
        (
            lambda ax: plot_posterior_band(
                ax, torch.ones(3), torch.ones(2), torch.ones(3)
            ),
            ShapeError,
            "mean has 2",
        ),
        (
            lambda ax: plot_trace(ax, torch.ones(1, 1, 1)),
            ShapeError,
            "values must be ``steps`` or ``runs x steps``",
        ),
        (
            lambda ax: plot_trace(ax, torch.tensor([float("nan")])),
            InputDataError,
            "values contains NaN",
        ),
        (
            lambda ax: plot_loss_along(
                ax, along(1.0, 2.0)._replace(error=None), quantity="error"
            ),
            ValueError,
            "no share of wrong labels",
        ),
        (lambda ax: plot_loss_along(ax, {}), ValueError, "at least one path"),
        (
            lambda ax: plot_loss_plane(ax, bowl(), quantity="error"),
            ValueError,
            "no share of wrong labels",
        ),
        (
            lambda ax: plot_loss_plane(ax, bowl(), labels=("one",)),
            ShapeError,
            "name the 2 points of the plane, but there are 1",
        ),
        (
            lambda ax: plot_loss_plane(ax, bowl(), highest=-1.0),
            ValueError,
            "highest must be above the lowest loss",
        ),
        (
            lambda ax: plot_loss_plane(ax, bowl(), trajectory=torch.ones(3)),
            ShapeError,
            r"trajectory must be ``k x 2``.*\(3,\)",
        ),
        (
            lambda ax: plot_loss_plane(
                ax, bowl()._replace(loss=torch.full((17, 15), torch.nan))
            ),
            ValueError,
            "NaN or Inf on all of the plane",
        ),
        (
            lambda ax: plot_subspace_density(
                ax, *normal_density(9)[:2], torch.ones(3, 9)
            ),
            ShapeError,
            r"9 x 9, but has shape \(3, 9\)",
        ),
        (
            lambda ax: plot_subspace_density(ax, *normal_density(9), masses=(1.0,)),
            ValueError,
            "masses must be below 1",
        ),
        (
            lambda ax: plot_confidence_gap(ax, {}, torch.ones(3).long()),
            ValueError,
            "at least one model",
        ),
        (
            lambda ax: plot_entropy_histograms(ax, torch.eye(3), torch.eye(2)),
            ShapeError,
            "inside has 3 classes, but outside has 2",
        ),
    ],
)
def test_bad_input_is_refused_with_its_reason(ax, call, error, message):
    with pytest.raises(error, match=message):
        call(ax)
