"""The studies of bandits and active learning: worlds as published, runs that resume."""

import json
import math
import sys

import pytest
import torch

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import bandit_problems
import quality_active_learning
import quality_bandits
from run_records import Records, mean_and_error

SMOKE = {
    "bandits": (
        quality_bandits.main,
        ["--problems", "wheel .5", "digits", "--methods", "greedy", "last layer"],
    ),
    "active learning": (
        quality_active_learning.main,
        ["--sets", "digits", "--batches", "10", "--methods", "random", "BAIT"],
    ),
}


def saved(path):
    """Runs without their times."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in run.items() if k != "seconds"} for run in lines]


def study(name, path, *more):
    main, arguments = SMOKE[name]
    main(["--smoke", "--save", str(path), *arguments, *more])


@pytest.mark.slow
@pytest.mark.parametrize("name", SMOKE)
def test_a_resumed_study_equals_an_uninterrupted_one(name, tmp_path):
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    study(name, whole, "--seeds", "0", "1")
    lines = whole.read_text().splitlines(keepends=True)
    resumed.write_text("".join(lines[:1]) + lines[1][:20])  # cut off in the second run
    study(name, resumed, "--seeds", "0", "1")
    text = resumed.read_text().splitlines(keepends=True)
    assert text[0] == lines[0]  # not made again
    resumed.write_text("".join(text[:1] + text[2:]))
    assert saved(resumed) == saved(whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMOKE)
def test_two_seeds_give_tables_and_a_figure(name, tmp_path, capsys):
    path, figure = tmp_path / "runs.jsonl", tmp_path / "figure.png"
    study(name, path, "--seeds", "0", "1")
    first, second = saved(path)[0], saved(path)[-1]
    assert first["seed"] == 0 and second["seed"] == 1
    capsys.readouterr()
    SMOKE[name][0](["--smoke", "--save", str(path), "--table", "--figure", str(figure)])
    printed = capsys.readouterr().out
    assert "±" in printed and "nan" not in printed
    assert figure.stat().st_size > 0


def test_a_run_that_is_there_is_not_made_again(tmp_path):
    records = Records(tmp_path / "runs.jsonl", ["seed"])
    made = []

    def make(plan):
        made.append(plan["seed"])
        return {"value": plan["seed"] ** 2}

    records.complete([{"seed": 2}, {"seed": 3}], make)
    with records.path.open("a") as file:
        file.write('{"seed": 4, "val')  # interrupted
    runs = records.complete([{"seed": s} for s in (1, 2, 4)], make)
    assert made == [2, 3, 1, 4]
    assert [run["value"] for run in runs] == [1, 4, 16]
    assert sorted(records.runs()) == [(1,), (2,), (3,), (4,)]


def test_the_standard_error_is_that_of_the_mean():
    mean, error = mean_and_error([1.0, 3.0])
    assert mean == 2 and error == pytest.approx(math.sqrt(2) / math.sqrt(2))


def test_the_wheel_pays_as_published():
    bandit = bandit_problems.wheel(0.9, 20_000, 0)
    radius = bandit.contexts.norm(dim=-1)
    assert radius.max() <= 1
    outside = radius > 0.9
    # 1 - delta^2 of the contexts, within four standard deviations
    assert abs(outside.double().mean() - 0.19) < 4 * (0.19 * 0.81 / 20_000) ** 0.5
    assert set(bandit.means[~outside].unique(dim=0)[0].tolist()) == {1.0, 1.2}
    best = bandit.means.argmax(-1)
    assert (best[~outside] == 0).all()
    assert set(best[outside].tolist()) == {1, 2, 3, 4}
    for arm in range(1, 5):  # one quadrant each
        signs = bandit.contexts[outside & (best == arm)].sign()
        assert len(signs.unique(dim=0)) == 1
    assert bandit.means[outside].amax(-1).eq(50).all()
    assert (bandit.rewards - bandit.means).std().item() == pytest.approx(0.01, rel=0.05)


def test_all_methods_of_a_seed_meet_the_same_world():
    one, two = (bandit_problems.load("wheel .5", 50, 3, None) for _ in range(2))
    assert torch.equal(one.contexts, two.contexts)
    assert torch.equal(one.rewards, two.rewards)
    other = bandit_problems.load("wheel .5", 50, 4, None)
    assert not torch.equal(one.contexts, other.contexts)


def test_the_network_of_arms_has_a_masked_loss():
    network = bandit_problems.ArmNetwork(5, 3).double()
    x = torch.tensor([[0.3, -1.0, 0.0, 1.0, 0.0]]).double()
    (gradient,) = torch.autograd.grad(network(x).sum(), network.head.weight)
    assert gradient[1].abs().sum() > 0 and gradient[[0, 2]].abs().sum() == 0


def test_linear_regression_of_an_arm_is_the_conjugate_posterior():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(12, 3, generator=generator).double()
    y = torch.randn(12, generator=generator).double()
    model = quality_bandits.LinearArms(3, 2)
    for x, reward in zip(X, y, strict=True):
        model.observe(x, 1, reward)
    precision = X.T @ X + 0.25 * torch.eye(3).double()
    mean = torch.linalg.solve(precision, X.T @ y)
    torch.testing.assert_close(model.mean[1], mean)
    residual = (y - X @ mean).square().sum() + 0.25 * mean.square().sum()
    torch.testing.assert_close(model.scale()[1], 6 + residual / 2)
    assert model.mean[0].abs().sum() == 0
    # a drawn value is a Student t of 2a degrees of freedom around the mean
    x = X[0]
    draws = torch.stack([model.draw(x, generator)[1] for _ in range(2000)])
    a, b = 6 + 12 / 2, float(model.scale()[1])
    variance = float(b / (a - 1) * (x @ torch.linalg.solve(precision, x)))
    assert abs(draws.mean() - x @ mean) < 4 * (variance / 2000) ** 0.5
    assert float(draws.var()) == pytest.approx(variance, rel=0.2)


def test_labels_needed_are_read_off_the_curve():
    run = {"labels": [20, 30, 40], "accuracy": [0.5, 0.7, 0.9]}
    needed = quality_active_learning.labels_needed
    assert needed(run, 0.8) == pytest.approx(35)
    assert needed(run, 0.4) == 20
    assert needed(run, 0.95) == 40


def test_networks_are_trained_often_at_first():
    times = quality_bandits.retrained_at(1000)
    assert times[:3] == [20, 40, 60] and times[9:12] == [200, 250, 300]
    assert times[-2:] == [950, 1000]
    assert quality_bandits.retrained_at(60) == [20, 40, 60]
