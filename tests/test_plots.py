import sys

import pytest
import torch
from botorch.exceptions.errors import InputDataError

from gpbridge.checks import ShapeError
from gpbridge.metrics import expected_calibration_error, reliability_curve
from gpbridge.plots import plot_posterior_band, plot_reliability, plot_trace

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


def draw_all(ax):
    x = torch.linspace(1, 0, 5, requires_grad=True)
    plot_posterior_band(ax, x, x[:, None], x, train_x=x, train_y=x)
    plot_reliability(ax, reliability_curve(*probabilities()), label="MAP")
    plot_trace(ax, torch.ones(2, 5), target=1.0, label="runs")


def test_plots_return_the_axes_that_they_drew_into(ax):
    x = torch.arange(4.0)
    assert plot_posterior_band(ax, x, x, x) is ax
    assert plot_reliability(ax, reliability_curve(*probabilities())) is ax
    assert plot_trace(ax, x) is ax


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
    ],
)
def test_bad_input_is_refused_with_its_reason(ax, call, error, message):
    with pytest.raises(error, match=message):
        call(ax)
