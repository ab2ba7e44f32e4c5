"""Ascent of lower bounds: resumed, refused, interrupted, diverged."""

import copy
import re

import pytest
import torch
from torch import nn

from gpbridge.dnn.divergence import DivergedError
from gpbridge.dnn.elbo_training import ascend_elbo
from gpbridge.storage import load_state, save_state


def seeded(seed):
    return torch.Generator().manual_seed(seed)


X = torch.randn(10, 3, generator=seeded(0))
Y = X.sum(-1, keepdim=True)


class Nested(nn.Module):
    """A regression with noise on its weights, in a module within a module."""

    def __init__(self, width=4, scale=0.1):
        super().__init__()
        self.scale = scale
        self.parts = nn.ModuleDict({"in": nn.Linear(3, width)})
        self.head = nn.Linear(width, 1)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.linspace(-0.5, 0.5, p.numel()).view_as(p))
        self._calls = 0  # what is left behind by calls is no option

    def forward(self, x, generator):
        self._calls += 1
        hidden = self.parts["in"](x)
        noise = torch.randn(hidden.shape, generator=generator)
        return self.head(torch.tanh(hidden + self.scale * noise))


def fit(model, data=(X, Y), rate=0.05, seen=None, **options):
    def elbo(rows, generator):
        if seen is not None:
            seen.append(rows.tolist())
        return -(model(data[0][rows], generator) - data[1][rows]).square().mean()

    given = {"epochs": 3, "batch_size": 4, "generator": None, "resume": None}
    given |= {"progress": False, "callback": None, "usual_rate": 1e-2}
    groups = options.pop("groups", [(list(model.parameters()), rate)])
    return ascend_elbo(
        model, elbo, data, groups=groups, name="fit", **{**given, **options}
    )


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_every_epoch_sees_every_row_once_and_the_bound_rises():
    seen, model = [], Nested()
    result = fit(model, seen=seen, epochs=20)
    assert result.model is model and not model.training
    assert result.history["elbo"][-1] > result.history["elbo"][0] + 0.5
    for epoch in range(20):
        batches = seen[3 * epoch : 3 * epoch + 3]
        assert [len(rows) for rows in batches] == [4, 4, 2]
        assert sorted(sum(batches, [])) == list(range(10))
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_resumed_run_is_the_run_without_a_pause(tmp_path):
    whole = fit(Nested(), epochs=4)
    half = fit(Nested(), epochs=2)
    save_state(half.state, tmp_path / "state")
    state = load_state(tmp_path / "state")
    kept = copy.deepcopy(state)
    rest = fit(Nested(), epochs=2, resume=state)
    assert rest.history == whole.history and len(rest.history["elbo"]) == 4
    assert equal(rest.model.state_dict().values(), whole.model.state_dict().values())
    again = fit(Nested(), epochs=2, resume=state)  # the state was left alone
    assert again.history == whole.history
    assert kept["history"] == state["history"]
    # The trained model itself goes on, too, though it was called since.
    on = fit(half.model, epochs=2, resume=half.state)
    assert on.history == whole.history


@pytest.mark.parametrize(
    "change, message",
    [
        ({"data": (X + 1, Y)}, "its data is .*checksum"),
        ({"data": (X, -Y)}, "its data is .*checksum"),
        ({"data": (X[:9], Y[:9])}, r"its data is .*\(10, 3\).*now it is .*\(9, 3\)"),
        ({"model": Nested(width=5)}, r"its model is .*\(4, 3\).*now it is .*\(5, 3\)"),
        ({"model": Nested(scale=0.2)}, "its model is .*0.1.*now it is .*0.2"),
        (
            {"model": Nested().requires_grad_(False), "thaw": True},
            "its model is .*learnt.*now it is .*fixed",
        ),
    ],
)
def test_a_state_of_another_run_is_refused(change, message):
    state = fit(Nested(), epochs=1).state
    model = change.get("model", Nested())
    if "thaw" in change:
        model.head.requires_grad_(True)
    before = copy.deepcopy(model.state_dict())
    pattern = re.compile(f"of another run: {message}.*Pass the same data", re.DOTALL)
    with pytest.raises(ValueError, match=pattern):
        fit(model, change.get("data", (X, Y)), resume=state)
    assert equal(before.values(), model.state_dict().values())


class Counting(Nested):
    """Calls counted where they are an option, and where they are state."""

    def __init__(self, public):
        super().__init__()
        self.public = public
        self.calls = 0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x, generator):
        self.calls += self.public
        self.count += 1
        return super().forward(x, generator)


def test_a_count_goes_on_in_a_buffer_and_is_an_option_in_a_public_attribute():
    state = fit(Counting(False), epochs=1).state
    assert int(fit(Counting(False), epochs=1, resume=state).model.count) == 6
    trained = fit(Counting(True), epochs=1)
    match = "its model is .*'calls': '0'.*'calls': '3'.*in a buffer.*an underscore"
    with pytest.raises(ValueError, match=re.compile(match, re.DOTALL)):
        fit(trained.model, epochs=1, resume=trained.state)


def test_another_rate_and_batch_size_may_go_on():
    state = fit(Nested(), epochs=1).state
    one, two = (
        fit(Nested(), rate=rate, batch_size=5, resume=state, epochs=1)
        for rate in (0.05, 0.01)
    )
    assert len(one.history["elbo"]) == 2
    moved = [
        sum(
            (p - state["model"][name]).abs().sum()
            for name, p in result.model.named_parameters()
        )
        for result in (one, two)
    ]
    assert moved[0] > 2 * moved[1]


def test_groups_have_their_rates_and_frozen_weights_stay():
    model = Nested()
    model.head.bias.requires_grad_(False)
    start = copy.deepcopy(model.state_dict())
    inner, outer = list(model.parts.parameters()), list(model.head.parameters())
    fit(model, epochs=1, batch_size=10, groups=[(inner, 0.1), (outer, 0.001)])
    moved = {n: (p - start[n]).abs().max().item() for n, p in model.named_parameters()}
    assert moved["head.bias"] == 0  # Adam's first step is the rate
    assert moved["parts.in.weight"] == pytest.approx(0.1, rel=1e-3)
    assert moved["head.weight"] == pytest.approx(0.001, rel=1e-2)


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match=r"nothing to train.*requires_grad_\(True\)"):
        fit(Nested().requires_grad_(False))


@pytest.mark.parametrize("rate, advice", [(1.0, "0.01"), (0.05, "0.005")])
def test_a_run_that_diverges_says_which_rate_to_try(rate, advice):
    model, kept = Nested(), []

    def spoil(epoch, model, entry):
        kept.append(copy.deepcopy(model.state_dict()))
        if epoch == 1:
            model.head.bias.data.fill_(torch.nan)

    message = f"after 2 of 5 epochs.*learning_rate={advice} "
    with pytest.raises(DivergedError, match=message) as caught:
        fit(model, rate=rate, epochs=5, callback=spoil)
    assert len(caught.value.last_good.history["elbo"]) == 2
    assert equal(model.state_dict().values(), kept[1].values())


def test_an_interrupted_run_returns_the_last_good_epoch():
    def stop(epoch, model, entry):
        if epoch == 1:
            raise KeyboardInterrupt

    with pytest.warns(RuntimeWarning, match="after 2 of 5 epochs"):
        result = fit(Nested(), epochs=5, callback=stop)
    assert result.history == fit(Nested(), epochs=2).history
    model = Nested()

    def at_once(rows, generator):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ascend_elbo(
            model,
            at_once,
            (X,),
            groups=[(list(model.parameters()), 0.1)],
            epochs=1,
            batch_size=4,
            generator=None,
            resume=None,
            progress=False,
            callback=None,
            name="fit",
            usual_rate=0.1,
        )
    assert not model.training


def test_a_callback_ends_training_by_true_alone():
    assert len(fit(Nested(), callback=lambda *_: 1).history["elbo"]) == 3
    assert len(fit(Nested(), callback=lambda e, *_: e == 1).history["elbo"]) == 2


def test_the_same_seed_gives_the_same_fit_and_the_global_state_stays():
    models = [Nested() for _ in range(3)]  # torch's own layers draw their start
    state = torch.get_rng_state()
    first, second, third = (
        fit(model, generator=seeded(seed)).history["elbo"]
        for model, seed in zip(models, (1, 1, 2), strict=True)
    )
    assert first == second != third
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"epochs": 0}, "epochs must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"rate": -1.0}, "learning_rate must be positive"),
        ({"resume": {"model": {}}}, "resume must be the state.*lacks.*run"),
        ({"resume": {}, "generator": seeded(0)}, "resume or generator and not both"),
    ],
)
def test_bad_options_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        fit(Nested(), **change)


def test_a_fit_is_no_state():
    model = Nested()
    done = fit(model, epochs=1)
    with pytest.raises(TypeError, match="must be the state .* fit.state, but is ELBO"):
        fit(model, resume=done)
