"""Runs shorter than a schedule was made for: intervals scale with the run, and what cannot work says so."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from spartan import (
    DPF,
    GMP,
    GSE,
    IHT,
    SET,
    SRSTE,
    WGSEF,
    Dense,
    DualAveraging,
    MaskDecay,
    OneShot,
    Powerpropagation,
    RigL,
    Sparsifier,
    Spartan,
    StaticRandom,
    TopKAST,
)
from spartan.methods import Method
from spartan.methods.base import changes_in, steps_of

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULED: dict[str, Callable[..., Method]] = {
    "GMP": lambda **own: GMP(sparsity=0.8, **own),
    "RigL": lambda **own: RigL(sparsity=0.8, **own),
    "SET": lambda **own: SET(sparsity=0.8, **own),
    "GSE": lambda **own: GSE(sparsity=0.8, **own),
    "TopKAST": lambda **own: TopKAST(sparsity=0.8, backward_sparsity=0.5, **own),
    "DPF": lambda **own: DPF(sparsity=0.8, **own),
    "Powerpropagation": lambda **own: Powerpropagation(method=GMP(sparsity=0.8, **own)),
}
EVERY_STEP: tuple[Method, ...] = (
    Spartan(sparsity=0.8),
    DualAveraging(sparsity=0.8),
    IHT(sparsity=0.8),
    WGSEF(sparsity=0.5, block_size=4),
    SRSTE(pattern=None, sparsity=0.8),
    MaskDecay(pattern=None, sparsity=0.8),
)


class Run:
    """A perceptron in training, whose masks are recorded."""

    def __init__(self, method: Method, total_steps: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 26), nn.Tanh(), nn.Linear(26, 3))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.sparsifier = Sparsifier(self.model, method, total_steps, count="masked")

    def train(self, steps: int) -> list[int]:
        """Attach, make the steps, and return those after which the hard masks were others than before."""
        self.sparsifier.attach(self.optimizer)
        changed = []
        for step in range(1, steps + 1):
            before = [mask.hard.clone() for mask in self.sparsifier.masks().values()]
            x = torch.randn(16, 20)
            self.optimizer.zero_grad()
            nn.functional.mse_loss(self.model(x), x[:, :3] * x[:, 3:6]).backward()
            self.optimizer.step()
            after = [mask.hard for mask in self.sparsifier.masks().values()]
            if any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)):
                changed.append(step)
        return changed


@pytest.fixture
def quiet() -> Iterator[None]:
    """Fail at any warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_an_interval_is_a_number_of_steps_or_a_fraction_of_them() -> None:
    assert [steps_of(interval, 80) for interval in (1, 100, 0.02, 0.5, 1e-9)] == [1, 100, 2, 40, 1]
    assert [steps_of(0.02, total) for total in (1, 100, 1872, 32_000)] == [1, 2, 37, 640]


@pytest.mark.parametrize("interval", [1, 3, 7, 0.1, 0.3])
@pytest.mark.parametrize(("begin", "end"), [(0.0, 0.75), (0.2, 0.8), (0.5, 0.5), (0.1, 1.0), (0.9, 0.1)])
@pytest.mark.parametrize("total", [1, 2, 20, 33])
def test_changes_are_counted_as_they_come(interval: int | float, begin: float, end: float, total: int) -> None:
    steps = steps_of(interval, total)
    expected = [t for t in range(1, total + 1) if t % steps == 0 and begin * total < t < end * total]
    assert changes_in(interval, total, begin, end) == len(expected)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("total", [80, 200])
@pytest.mark.parametrize("name", SCHEDULED)
def test_defaults_change_masks_many_times_in_a_run_of_any_length(name: str, total: int) -> None:
    """With an interval of 100 steps, 80 of them made GMP one-shot and RigL static."""
    run = Run(SCHEDULED[name](), total)
    changed = run.train(total)
    assert len(changed) >= 10
    assert changed[0] <= 0.05 * total
    run.sparsifier.finalize()
    assert run.sparsifier.sparsity == pytest.approx(0.8, abs=2e-3)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("total", [80, 200])
def test_a_fraction_is_the_number_of_steps_that_it_stands_for(total: int) -> None:
    models = []
    for interval in (0.1, total // 10):
        run = Run(RigL(sparsity=0.8, interval=interval, fraction=0.9), total)
        assert run.train(total) == [total * i // 10 for i in range(1, 8)]
        models.append(run.model)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", SCHEDULED)
def test_an_interval_longer_than_the_schedule_is_told(name: str) -> None:
    masking = SCHEDULED[name](interval=100)
    with pytest.warns(UserWarning, match=r"total_steps=80: .*interval=100, and masks change between steps 0 and"):
        run = Run(masking, 80)
    last = {"TopKAST": 80, "DPF": 80}.get(name, 60)
    assert [step for step in run.train(80) if step < last] == []


@pytest.mark.parametrize("method", EVERY_STEP, ids=lambda method: method.name)
def test_a_single_step_is_too_few_for_a_schedule(method: Method) -> None:
    with pytest.warns(UserWarning, match=f"{method.name} with total_steps=1: it"):
        Run(method, 1)


@pytest.mark.usefixtures("quiet")
def test_what_has_no_schedule_is_not_warned_of() -> None:
    immediate: list[Method] = [
        GMP(sparsity=0.8, begin=0.5, end=0.5, interval=100),
        Spartan(sparsity=0.8, ramp=0.0, anneal=0.0),
        DualAveraging(sparsity=0.8, ramp=0.0, freeze=0.0),
        OneShot(sparsity=0.8),
        StaticRandom(sparsity=0.8),
        Dense(),
    ]
    for method in (*immediate, *EVERY_STEP):
        Run(method, 80)
    for method in immediate:
        Run(method, 1)


@pytest.mark.parametrize("interval", [0, -1, True, 1.0, 0.0, 1.5, -0.1, float("nan"), float("inf"), "often", None])
@pytest.mark.parametrize("name", SCHEDULED)
def test_other_intervals_are_refused(name: str, interval: object) -> None:
    with pytest.raises(ValueError, match=rf"interval must be .* in \(0, 1\) .*; got {re.escape(repr(interval))}"):
        SCHEDULED[name](interval=interval)


def test_finalize_before_any_step_is_told() -> None:
    run = Run(Spartan(sparsity=0.8), 80)
    with pytest.warns(UserWarning, match=r"before the first step that Spartan knows of .* attach\(optimizer\)"):
        run.sparsifier.finalize()
    assert run.sparsifier.sparsity == pytest.approx(0.8, abs=1e-3)


def test_finalize_far_before_the_end_is_told() -> None:
    run = Run(Spartan(sparsity=0.8), 80)
    run.train(40)
    with pytest.warns(UserWarning, match=r"after 40 of total_steps=80 steps, when Spartan has not fixed its masks"):
        run.sparsifier.finalize()


@pytest.mark.usefixtures("quiet")
def test_finalize_in_time_is_silent() -> None:
    for method, steps in (
        (Spartan(sparsity=0.8), 64),  # masks are fixed from here on
        (DPF(sparsity=0.8), 72),  # nearly all steps
        (OneShot(sparsity=0.8, prune_at=0), 0),  # prunes what is there
        (Dense(), 0),
    ):
        run = Run(method, 80)
        run.train(steps)
        run.sparsifier.finalize()
