"""Scans: the curve, its maxima, and the global optimum that one ascent misses."""

import math

import pytest
import torch
from botorch.exceptions.errors import InputDataError
from gpytorch.kernels import Kernel, PeriodicKernel, ScaleKernel
from linear_operator.utils.errors import NotPSDError
from torch import nn

from gpbridge.checks import NotConvergedWarning
from gpbridge.plots import plot_scan
from gpbridge.selection import ScanResult, log_evidence, scan
from gpbridge.selection.ascent import ascend
from tests.linearized.problems import build
from tests.selection.test_marginal_likelihood import data, likelihood, quiet, single

GRID = torch.linspace(-3.0, 3.0, 25).double()


def cubic(n):
    """A cubic on [-1, 1] and a little noise."""
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.rand(n, 1, generator=generator, dtype=torch.float64) - 1
    noise = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    return x, 2 * x**3 - 1.5 * x + 0.5 + 0.1 * noise


class Hills(nn.Module):
    """An evidence in two unknowns with three maxima in the first, all known."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ParameterDict({"y": nn.Parameter(torch.zeros(()).double())})
        self.x = nn.Parameter(torch.tensor(-3.0).double())

    def forward(self):
        best_y = self.x.cos()
        hills = torch.cos(3 * self.x) + 0.3 * self.x
        return 10 * hills - 5 * (self.inner["y"] - best_y) ** 2

    def initialize(self, **values):
        for name, value in values.items():
            if not isinstance(getattr(self, name, None), nn.Parameter):
                raise AttributeError(name)
            with torch.no_grad():
                getattr(self, name).copy_(value)


def height(x):
    return 10 * (torch.cos(3 * x) + 0.3 * x)


def evidence(model):
    return model()


def put(model, value):
    model.initialize(x=torch.tensor(value).double())


# Where the derivative -3 sin 3x + 0.3 vanishes beside the multiples of 2 pi / 3.
PEAKS = [2 * math.pi * k / 3 + math.asin(0.1) / 3 for k in (1, 0, -1)]


@pytest.mark.parametrize("warm_start", [True, False])
def test_the_curve_is_maximised_over_everything_else(warm_start):
    model = Hills()
    found = scan(model, "x", GRID, evidence, warm_start=warm_start, polish=0)
    torch.testing.assert_close(found.evidence, height(GRID), rtol=1e-6, atol=1e-6)
    assert torch.equal(found.grid, GRID) and found.polished == ()
    assert found.best_evidence == found.evidence.max()
    assert found.best_value == GRID[found.evidence.argmax()]
    assert model.x.item() == found.best_value
    assert model.inner["y"].item() == pytest.approx(math.cos(found.best_value), 1e-3)


@pytest.mark.parametrize("how", ["x", put])
def test_polish_reaches_every_maximum_and_keeps_the_highest(how):
    model = Hills()
    found = scan(model, how, GRID, evidence, polish=3)
    assert len(found.maxima) == 3
    heights = found.evidence[list(found.maxima)]
    assert torch.equal(heights, heights.sort(descending=True).values)
    for place, peak in zip(found.maxima, PEAKS, strict=True):
        assert GRID[place].item() == pytest.approx(peak, abs=0.26)
    for record, peak in zip(found.polished, PEAKS, strict=True):
        assert record.value == pytest.approx(peak, abs=2e-3)
        wanted = height(torch.tensor(peak).double()).item()
        assert record.evidence == pytest.approx(wanted, abs=1e-3)
    assert found.best_value == pytest.approx(PEAKS[0], abs=2e-3)
    assert found.best_evidence == model().item()


def test_one_ascent_ends_in_the_nearest_maximum_and_a_scan_does_not():
    alone = Hills()
    local = ascend(alone, alone, 200).value
    assert alone.x.item() < -1.5
    found = scan(Hills(), "x", GRID, evidence)
    assert found.best_evidence > local + 10


@quiet
def test_the_period_of_a_series_is_found_where_one_ascent_fails():
    generator = torch.Generator().manual_seed(0)
    X = torch.linspace(0, 1, 50).double()[:, None]
    noise = torch.randn(50, 1, generator=generator, dtype=torch.float64)
    Y = torch.sin(2 * math.pi * X / 0.17) + 0.3 * noise

    def model():
        periodic = ScaleKernel(PeriodicKernel()).double()
        periodic.base_kernel.period_length = 0.5
        return single(X, Y, covar_module=periodic, likelihood=likelihood())

    alone = model()
    local = ascend(alone, lambda: log_evidence(alone), 200).value
    series = model()
    name = "covar_module.base_kernel.period_length"
    grid = torch.linspace(0.08, 0.5, 15)
    found = scan(series, name, grid, polish=2, refit_steps=5, progress=False)
    assert found.best_evidence > local + 5
    period = found.best_value  # or a multiple of it, which describes the same series
    assert min(abs(period - k * 0.17) for k in (1, 2)) < 0.01
    assert found.best_evidence == pytest.approx(log_evidence(series).item())
    assert found.best_evidence >= found.evidence.max()


class Powers(Kernel):
    """Polynomials up to an order, each coefficient with prior variance one."""

    def __init__(self, order):
        super().__init__()
        self.order = order

    def forward(self, x1, x2, diag=False, **params):
        x1, x2 = (
            torch.cat([x**k for k in range(self.order + 1)], -1) for x in (x1, x2)
        )
        return (x1 * x2).sum(-1) if diag else x1 @ x2.mT


@quiet
def test_a_discrete_choice_behind_a_setter_finds_the_true_order():
    X, Y = cubic(60)
    model = single(X, Y, likelihood=likelihood())

    def order(model, power):
        model.covar_module = ScaleKernel(Powers(int(power))).double()

    found = scan(model, order, [1, 2, 3, 4, 5, 6], polish=0, refit_steps=10)
    assert found.best_value == 3 and found.name == "order"
    assert model.covar_module.base_kernel.order == 3
    assert log_evidence(model).item() == pytest.approx(found.best_evidence)
    # The order too small fits worse, one too large only costs.
    assert found.evidence[2] > found.evidence[1] + 10
    assert (found.evidence[3:] < found.evidence[2]).all()


@quiet
def test_without_refits_the_curve_is_the_evidence_at_each_value():
    X, Y = data()
    model = single(X, Y)
    name = "covar_module.base_kernel.lengthscale"
    found = scan(model, name, [1.0, 0.1, 0.3], polish=0, refit_steps=0)
    assert found.grid.tolist() == [0.1, 0.3, 1.0]
    for value, got in zip(found.grid, found.evidence, strict=True):
        model.covar_module.base_kernel.lengthscale = value
        assert log_evidence(model).item() == pytest.approx(got.item())


def test_a_linearised_network_is_scanned_by_its_prior_variance():
    model = build("gaussian")
    found = scan(model, "covar_module.prior_variance", torch.logspace(-2, 2, 5))
    assert found.best_evidence == pytest.approx(model.log_evidence().item())
    assert found.best_evidence >= found.evidence.max()


@quiet
def test_what_was_fixed_and_the_mode_stay():
    X, Y = data()
    model = single(X, Y).eval()
    model.likelihood.noise_covar.raw_noise.requires_grad_(False)
    before = model.likelihood.noise.item()
    required = {n: p.requires_grad for n, p in model.named_parameters()}
    random = torch.get_rng_state()
    scan(model, "covar_module.base_kernel.lengthscale", [0.1, 0.3, 1.0])
    assert model.likelihood.noise.item() == before
    assert required == {n: p.requires_grad for n, p in model.named_parameters()}
    assert not model.training and torch.equal(random, torch.get_rng_state())


def test_several_numbers_set_as_one_may_part_in_the_polish():
    class Two(Hills):
        def __init__(self):
            super().__init__()
            self.x = nn.Parameter(torch.zeros(2).double())

        def forward(self):
            return -((self.x - torch.tensor([0.2, 0.4])) ** 2).sum()

    found = scan(Two(), "x", [-1.0, 0.0, 1.0], evidence)
    assert found.best_value == pytest.approx([0.2, 0.4], abs=1e-4)
    assert "[0.2" in repr(found)


def test_a_plateau_is_one_maximum():
    class Flat(Hills):
        def forward(self):
            return -torch.relu(self.x.abs() - 1) + 0 * self.inner["y"]

    found = scan(Flat(), "x", GRID, evidence, polish=0)
    assert len(found.maxima) == 1 and found.best_evidence == 0


def test_values_without_a_finite_evidence_are_left_out_and_named():
    def broken(model):
        if float(model.x) > 1:
            raise NotPSDError("not positive definite")
        return model() if float(model.x) > -2 else model() * math.nan

    with pytest.warns(NotConvergedWarning, match="not finite at x = -3, -2.*left out"):
        found = scan(Hills(), "x", [-3, -2, -1, 0, 1, 2, 3], broken, polish=0)
    assert found.evidence.isinf().tolist() == [True] * 2 + [False] * 3 + [True] * 2
    assert found.best_value == 0
    with pytest.raises(ValueError, match="No grid value has a finite evidence"):
        model = Hills()
        scan(model, "x", [2, 3], broken)
    assert model.x.item() == -3 and model.inner["y"].item() == 0


def test_after_an_error_buffers_are_as_they_were_too():
    class Shifted(Hills):
        def __init__(self):
            super().__init__()
            self.register_buffer("shift", torch.tensor(0.5).double())

        def forward(self):
            return math.nan * self.shift

    def shift(model, value):
        model.shift.fill_(value)

    model = Shifted()
    with pytest.raises(ValueError, match="parameters and buffers of the model are as"):
        scan(model, shift, [2, 3], evidence)
    assert model.shift.item() == 0.5


def test_a_polish_that_breaks_down_keeps_the_grid_value():
    calls = []

    def fragile(model):
        calls.append(1)
        if model.x.requires_grad:
            raise NotPSDError("not positive definite")
        return model()

    found = scan(Hills(), "x", GRID, fragile, polish=1)
    assert found.best_evidence == found.evidence.max()
    assert found.polished[0].value == found.best_value


@quiet
def test_wrong_names_and_grids_are_refused_and_the_model_stays():
    X, Y = data()
    model = single(X, Y)
    before = log_evidence(model).item()
    with pytest.raises(ValueError, match="no parameter 'covar_module.size'. It has l"):
        scan(model, "covar_module.size", [1.0, 2.0])
    name = "covar_module.base_kernel.lengthscale"

    def infinite(model, value):
        model.covar_module.base_kernel.raw_lengthscale.data.fill_(math.inf)

    with pytest.raises(ValueError, match="makes the parameter.*infinite or NaN"):
        scan(model, infinite, [0.5, 1.0])
    for grid in ([1.0], [1.0, 1.0]):
        with pytest.raises(ValueError, match="at least two different values"):
            scan(model, name, grid)
    with pytest.raises(InputDataError, match="NaN or Inf"):
        scan(model, name, [1.0, math.nan])
    with pytest.raises(ValueError, match="lengthscale cannot be -1: .*out of bounds"):
        scan(model, name, [0.5, -1.0])
    assert log_evidence(model).item() == before


def test_the_curve_is_drawn_with_its_maxima_and_its_best_point():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    found = scan(Hills(), "x", GRID, evidence)
    ax = plot_scan(None, found, label="hills")
    curve, circles, star = ax.lines
    assert curve.get_ydata().tolist() == found.evidence.tolist()
    assert circles.get_xdata().tolist() == GRID[list(found.maxima)].tolist()
    fewer = scan(Hills(), "x", GRID, evidence, polish=1, refit_steps=0)
    assert plot_scan(None, fewer).lines[1].get_xdata() == [GRID[fewer.maxima[0]]]
    assert star.get_xdata() == [found.best_value]
    assert ax.get_xlabel() == "x" and ax.get_xscale() == "linear"
    gap = ScanResult(
        *("width", torch.logspace(-3, 0, 4), torch.tensor([1.0, -math.inf, 2, 0])),
        *((2,), (), [0.1, 0.2], 2.0),
    )
    ax = plot_scan(None, gap, xlabel="w")
    assert len(ax.lines) == 2 and len(ax.lines[0].get_xdata()) == 3
    assert ax.get_xscale() == "log" and ax.get_xlabel() == "w"
    with pytest.raises(TypeError, match="scan returned, but is list"):
        plot_scan(None, [1.0])
    pyplot.close("all")
