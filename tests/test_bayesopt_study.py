"""The study of Bayesian optimisation: its problems, its pairs, and that it resumes."""

import itertools
import json
import math
import sys

import pytest
import torch
from botorch.utils.multi_objective.hypervolume import Hypervolume

from tests.conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

from bayesopt import methods, problems, report, study  # noqa: E402
from bayesopt.methods import SMOKE  # noqa: E402
from bayesopt.study import Run  # noqa: E402

NAMES = tuple(problems.PROBLEMS)
OPTIMA = {
    "branin": (math.pi, 2.275),
    "hartmann6": (0.20169, 0.150011, 0.476874, 0.275332, 0.311652, 0.6573),
    "ackley10": (0.0,) * 10,
}


def without_times(lines):
    return [{k: v for k, v in line.items() if "seconds" not in k} for line in lines]


# Problems


@pytest.mark.parametrize("name", NAMES)
def test_a_problem_has_its_shapes_and_no_design_is_above_its_optimum(name):
    target = problems.problem(name)
    X = study.initial_design(target, 0)
    Y = target.evaluate(X)
    low, high = target.bounds
    assert X.shape == (target.num_initial, target.dim) and X.dtype == torch.float64
    assert bool(((low <= X) & (high >= X)).all())
    assert Y.shape == (len(X), 1 if target.ref_point is None else 2)
    assert float(target.score(Y)[-1]) < target.optimum
    assert torch.equal(target.evaluate(X), Y)  # no noise
    assert torch.allclose(target.evaluate(X[3:4]), Y[3:4], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OPTIMA)
def test_a_known_maximiser_reaches_the_optimum(name):
    target = problems.problem(name)
    X = torch.tensor([OPTIMA[name]], dtype=torch.float64)
    assert float(target.evaluate(X)) == pytest.approx(target.optimum, abs=1e-5)
    assert target.exact


def test_the_polynomial_is_zero_at_its_centre_and_below_elsewhere():
    target = problems.problem("poly200")
    generator = torch.Generator().manual_seed(200)
    centre = 0.2 + 0.6 * torch.rand(1, 200, generator=generator, dtype=torch.float64)
    assert float(target.evaluate(centre)) == 0 == target.optimum
    assert bool((target.evaluate(target.to_inputs(torch.rand(50, 200))) < 0).all())


def test_hypervolume_of_the_front_of_dtlz1_comes_near_its_optimum():
    target = problems.problem("dtlz1")
    X = torch.full((400, 5), 0.5, dtype=torch.float64)
    X[:, 0] = torch.linspace(0, 1, 400)
    Y = target.evaluate(X)
    assert torch.allclose(Y.sum(-1), torch.tensor(-0.5, dtype=torch.float64))
    assert float(target.score(Y)[-1]) == pytest.approx(target.optimum, abs=1e-3)


def test_the_area_is_upstreams_hypervolume():
    target = problems.problem("dtlz1")
    Y = target.evaluate(torch.rand(30, 5, dtype=torch.float64))
    volume = Hypervolume(torch.tensor(target.ref_point, dtype=torch.float64))
    expected = volume.compute(Y[target.leaders(Y)])
    assert problems.area(Y, target.ref_point) == pytest.approx(expected, rel=1e-12)


def test_score_is_the_best_so_far_and_the_area_so_far():
    Y = torch.tensor([[1.0], [3.0], [2.0]], dtype=torch.float64)
    assert problems.problem("branin").score(Y).tolist() == [1, 3, 3]
    # Boxes from (-18, -6): 8 x 1, then 10 x 2 with it, then nothing new
    Y = torch.tensor([[-10, -5], [-8, -4], [-17, -5.5]], dtype=torch.float64)
    assert problems.problem("branincurrin").score(Y).tolist() == [8, 20, 20]


def pest_cost_by_loop(x):
    """One schedule and simulation at a time, after the published description."""
    stages, total = len(x), 0.0
    first, spread, uniforms = problems._pest_noise(stages)
    price, off = [0, 1.0, 0.8, 0.7, 0.5], [0, 0.2, 0.3, 0.3, 0]
    grow = [0, 1 / 7, 2.5 / 7, 2 / 7, 0.5 / 7]
    for simulation in range(len(first)):
        b = [None, 2 / 7, 3 / 7, 3 / 7, 5 / 7]
        share = float(first[simulation])
        for stage, used in enumerate(x):
            total += (share > 0.1) / len(first)
            if used:
                u = float(uniforms[stage, simulation])
                share *= u ** (1 / b[used])  # one minus a Beta(1, b)
                b[used] += grow[used] / stages
            else:
                share += float(spread[stage, simulation]) * (1 - share)
    return total + sum(price[u] * (1 - off[u] * x.count(u) / stages) for u in x)


def test_pest_control_is_the_loop_over_simulations():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(5, (3, 25), generator=generator)
    expected = [pest_cost_by_loop(row) for row in x.tolist()]
    assert problems.pest_cost(x.double()).tolist() == pytest.approx(expected, rel=1e-12)


def test_pest_control_in_a_row_of_the_best_schedule_costs_its_optimum():
    x = torch.tensor([[3.0] * 24 + [0.0]], dtype=torch.float64)
    assert float(-problems.pest_cost(x)) == pytest.approx(problems.FOUND["pest"])


def test_descent_on_a_straight_line_takes_the_time_of_constant_acceleration():
    line = torch.linspace(1, problems.END, problems.POINTS + 2, dtype=torch.float64)
    drop = 1 - problems.END
    expected = math.sqrt(2 * (1 + drop**2) / (problems.GRAVITY * drop))
    assert float(problems.descent_time(line[None, 1:-1])) == pytest.approx(expected)


def test_the_curve_of_quickest_descent_is_hardly_slower_than_the_cycloid():
    best = -problems.FOUND["curve64"]
    assert problems.cycloid_time() < best < 1.002 * problems.cycloid_time()


@pytest.mark.slow
@pytest.mark.parametrize("d", [10, 50, 400])
def test_long_searches_find_the_optima_of_network_draws(d):
    target = problems.problem(f"network{d}")
    generator = torch.Generator().manual_seed(1)
    start = torch.rand(100, d, generator=generator, dtype=torch.float64)
    found = problems.ascend(target.evaluate, start, target.bounds)
    assert found <= target.optimum + 1e-6
    assert found == pytest.approx(target.optimum, rel=0.02)


@pytest.mark.slow
def test_a_long_search_finds_the_optimum_of_the_curve():
    target = problems.problem("curve64")
    start = torch.linspace(0.9, problems.END, 64, dtype=torch.float64)[None]
    found = problems.ascend(target.evaluate, start, target.bounds, 3000)
    assert found == pytest.approx(target.optimum, abs=1e-6)
    assert found <= target.optimum + 1e-9


def test_the_network_of_curves_takes_flat_inputs_and_gives_a_column():
    target = problems.problem("curve64")
    assert target.network(64, 2)(torch.zeros(3, 64)).shape == (3, 2)


def test_a_problem_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"one of branin, .* but is 'brannin'"):
        problems.problem("brannin")


# Pairs


def test_every_method_of_a_seed_starts_from_the_same_design():
    lines = [
        study.execute(Run("branin", method, "improvement", 3), SMOKE)
        for method in ("random", "Sobol", "EnsembleSurrogate")
    ]
    target = problems.problem("branin")
    first = target.evaluate(study.initial_design(target, 3)).tolist()
    for line in lines:
        assert line["values"][:10] == first
        assert len(line["values"]) == 12
    for one, other in itertools.combinations(lines, 2):
        assert one["values"] != other["values"]


def test_seeds_have_designs_of_their_own_and_sobol_goes_on_with_it():
    target = problems.problem("hartmann6")
    assert not torch.equal(
        study.initial_design(target, 0), study.initial_design(target, 1)
    )
    longer = study.initial_design(target, 0, 4)
    assert torch.equal(longer[:-4], study.initial_design(target, 0))


def test_the_plan_completes_seeds_and_has_nothing_twice():
    runs = list(study.plan(("shortlist", "others", "thompson", "dense"), range(3)))
    assert len(set(runs)) == len(runs)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    everywhere = set(study.DESIGNS) | {methods.GP} | set(methods.SHORTLIST)
    for name in NAMES:
        assert everywhere <= {run.method for run in runs if run.problem == name}


def test_a_method_or_an_acquisition_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"one of random, .* but is 'Forest'"):
        methods.surrogate("Forest", SMOKE, 0)
    target = problems.problem("dtlz1")
    X = study.initial_design(target, 0)
    with pytest.raises(ValueError, match=r"for one outcome, but dtlz1 has 2"):
        methods.suggest(target, None, "thompson", X, target.evaluate(X), SMOKE, 0)


def test_candidates_are_inside_and_half_of_them_near_the_best():
    for name in ("pest", "network50", "dtlz1"):
        target = problems.problem(name)
        X = study.initial_design(target, 0)
        Y = target.evaluate(X)
        generator = torch.Generator().manual_seed(0)
        found = methods.candidate_inputs(target, X, Y, 40, generator)
        low, high = target.bounds
        assert bool(((low <= found) & (high >= found)).all())
        leaders = X[target.leaders(Y)]
        shared = (found[:, None] == leaders).sum(-1).amax(-1)
        if name != "dtlz1":  # five columns: all of them move
            assert bool((shared[20:] > target.dim / 2).all())
            assert bool((shared[:20] < target.dim / 2).all())


# Resuming

RUNS = [
    Run("branin", "random", "none", 0),
    Run("branin", "SingleTaskGP", "improvement", 0),
    Run("branin", "EnsembleSurrogate", "thompson", 0),
    Run("branin", "EnsembleSurrogate", "improvement", 1),
]


def test_an_interrupted_study_goes_on_as_if_it_had_not_been(tmp_path):
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    assert study.study(whole, RUNS, SMOKE) == 4
    assert study.study(parts, RUNS, SMOKE, at_most=2) == 2
    with open(parts, "a") as file:
        file.write('{"problem": "branin", "met')  # the machine stopped here
    torch.manual_seed(123)  # another process
    assert study.study(parts, RUNS, SMOKE) == 2
    assert without_times(study.read(whole)) == without_times(study.read(parts))
    assert study.study(parts, RUNS, SMOKE) == 0


def test_the_global_random_state_is_neither_used_nor_changed():
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        run = Run("pest", "EnsembleSurrogate", "improvement", 0)
        found.append(study.execute(run, SMOKE)["values"])
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1]


def test_other_settings_are_other_runs(tmp_path):
    path = tmp_path / "results.jsonl"
    study.study(path, RUNS[:1], SMOKE)
    longer = methods.Settings(iterations=3)
    assert study.study(path, RUNS[:1], longer) == 1


def test_a_fit_that_fails_is_noted_and_a_random_experiment_takes_its_place(monkeypatch):
    def fit(*args):
        raise RuntimeError("no convergence")

    monkeypatch.setattr(methods.Gaussian, "fit", fit)
    line = study.execute(RUNS[1], SMOKE)
    random = study.execute(RUNS[0], SMOKE)
    assert [f["iteration"] for f in line["failures"]] == [0, 1]
    assert "RuntimeError: no convergence" in line["failures"][0]["random_instead"]
    assert line["values"] == random["values"]


# The report


def line_of(method, seed, values, acquisition="improvement"):
    return {
        **Run("branin", method, acquisition, seed)._asdict(),
        "key": "k",
        "num_initial": 1,
        "batch_size": 1,
        "values": [[problems.problem("branin").optimum - value] for value in values],
        "failures": [],
        "seconds": [1.0],
        "cpu_seconds": [1.0] * (method != "random"),
    }


def made_up():
    lines = []
    for seed, scale in enumerate((1.0, 10.0, 0.1)):
        lines.append(line_of("random", seed, (scale, scale)))
        lines.append(line_of("SingleTaskGP", seed, (scale, scale / 10)))
        lines.append(line_of("EnsembleSurrogate", seed, (scale, scale / 1000)))
    return lines


def test_differences_are_between_runs_of_the_same_seed():
    found = report.curves(made_up())["branin"]
    off = report.differences(found["Ensemble"], found["SingleTaskGP"])
    assert off == pytest.approx([-2, -2, -2])
    assert report.ranks(found) == {
        "random": [3, 3, 3],
        "SingleTaskGP": [2, 2, 2],
        "Ensemble": [1, 1, 1],
    }
    shown = report.table(report.curves(made_up()))
    assert "| -3.00 ± 0.58 | **-2.00 [-2.00, -2.00]** | 1.0 | 1.00 | 3 |" in shown


def test_the_interval_is_students():
    low, high = report.interval([1.0, 2.0, 3.0, 4.0])
    error = math.sqrt(5 / 3) / 2
    assert (low, high) == pytest.approx((2.5 - 3.182 * error, 2.5 + 3.182 * error))
    assert report.interval([1.0]) is None


def test_ties_share_their_rank_and_seeds_that_one_lacks_do_not_count():
    lines = [line_of(m, 0, (1.0, 0.5)) for m in ("random", "SingleTaskGP")]
    lines.append(line_of("random", 1, (1.0, 0.1)))
    found = report.curves(lines)["branin"]
    assert report.ranks(found) == {"random": [1.5], "SingleTaskGP": [1.5]}
    assert "| 2 |" in report.table({"branin": found}).splitlines()[2]  # seeds
    assert report.differences(found["random"], found["SingleTaskGP"]) == [0.0]


def test_others_are_ranked_as_if_each_alone_had_joined():
    lines = made_up() + [line_of("SWAGSurrogate", 0, (1.0, 0.01))]
    lines.append(line_of("SingleTaskGP", 0, (1.0, 0.02), "thompson"))
    placed = report.ranks_of_all(report.curves(lines)["branin"])
    assert placed["Ensemble"] == [1, 1, 1]
    assert placed["SWAG"] == placed["SingleTaskGP, Thompson"] == [2]


def test_the_verdict_names_the_best_and_who_is_not_told_apart():
    shown = report.verdicts(report.curves(made_up())).splitlines()[-1]
    assert shown == "| Branin | yes | Ensemble | none | none |"


def test_a_report_of_a_file_writes_its_figures(tmp_path, capsys):
    report.write(made_up(), tmp_path)
    saved = tmp_path / "bayesopt_branin.png"
    assert saved.stat().st_size < 150_000
    assert "mean rank" in capsys.readouterr().out
    report.write([], tmp_path)
    assert "No finished run" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_seeds_of_every_problem_run(name, tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    parts = {"curve64": ("shortlist", "dense"), "pest": ("shortlist", "thompson")}
    runs = list(study.plan(parts.get(name, ("shortlist",)), range(2), [name]))
    assert study.study(path, runs, SMOKE) == len(runs)
    lines = study.read(path)
    for line in lines:
        assert line["failures"] == []
        assert all(map(math.isfinite, itertools.chain(*line["values"])))
    json.dumps(lines, allow_nan=False)
    report.write(lines, tmp_path)
    assert capsys.readouterr().out.count("figure:") == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", methods.OTHERS)
def test_every_other_recipe_runs(method):
    line = study.execute(Run("branin", method, "improvement", 0), SMOKE)
    assert line["failures"] == [] and len(line["values"]) == 12
