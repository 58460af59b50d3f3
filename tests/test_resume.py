"""Resumed training equals uninterrupted training, bit for bit; other checkpoints are refused."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from spartan.methods import (
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
    Method,
    OneShot,
    RigL,
    Spartan,
    StaticRandom,
    TopKAST,
)
from spartan.sparsifier import Sparsifier

TOTAL_STEPS = 30


pytestmark = pytest.mark.usefixtures("one_thread")


class Run:
    """A model in training; batch i is the same in every run."""

    def __init__(self, method: Method, by_hand: bool = False, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(96, 18), nn.ReLU(), nn.Linear(18, 4)
        )
        self.sparsifier = Sparsifier(self.model, method, TOTAL_STEPS)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.by_hand = by_hand
        if not by_hand:
            self.sparsifier.attach(self.optimizer)

    def train(self, begin: int, end: int) -> None:
        """Steps begin to end, each over two accumulated micro-batches."""
        for index in range(begin, end):
            generator = torch.Generator().manual_seed(index)
            self.optimizer.zero_grad()
            for _ in range(2):
                x = torch.randn(8, 1, 6, 6, generator=generator)
                functional.cross_entropy(self.model(x), x[:, 0, 0, :4].argmax(1)).backward()
            if self.by_hand:
                self.sparsifier.correct_gradients()
            self.optimizer.step()
            if self.by_hand:
                self.sparsifier.step(self.optimizer)

    def checkpoint(self) -> dict[str, Any]:
        """What a training script saves, through a file."""
        file = io.BytesIO()
        parts = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sparsifier": self.sparsifier.state_dict(),
        }
        torch.save(parts, file)
        file.seek(0)
        loaded: dict[str, Any] = torch.load(file, weights_only=True)
        return loaded

    def load(self, state: dict[str, Any]) -> None:
        """Restore `checkpoint()`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sparsifier.load_state_dict(state["sparsifier"])


METHODS = [
    Spartan(sparsity=0.8),
    Spartan(sparsity=0.5, block_size=(4, 5), distribution="erk", preserve_scale=True),
    Spartan(sparsity=0.8, beta=4.0, beta_units="threshold", distribution="uniform"),
    GMP(sparsity=0.8, interval=4),
    OneShot(sparsity=0.8),
    StaticRandom(sparsity=0.8),
    TopKAST(sparsity=0.8, backward_sparsity=0.5, interval=4, freeze=0.9),
    TopKAST(sparsity=0.5, backward_sparsity=0.3, block_size=(4, 5), interval=4, distribution="uniform", penalty="l1"),
    DualAveraging(sparsity=0.8),
    DPF(sparsity=0.8, interval=4),
    IHT(sparsity=0.8, block_size=(3, 4)),
    SET(sparsity=0.8, interval=3),
    RigL(sparsity=0.8, interval=3),
    RigL(sparsity=0.5, block_size=(4, 5), interval=4, distribution="global"),
    GSE(sparsity=0.8, interval=3),
    GSE(sparsity=0.5, block_size=(4, 5), interval=1, candidates=0.3, distribution="global"),
    SRSTE(pattern=None, sparsity=0.8),
    MaskDecay(pattern=None, sparsity=0.5, block_size=(4, 5), begin=0.1),
    WGSEF(sparsity=0.5, block_size=(4, 5), strength=3.0),
    Dense(),
]


@pytest.mark.parametrize("by_hand", [False, True], ids=["hooks", "hand"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_resume_equals_uninterrupted(method: Method, by_hand: bool) -> None:
    whole = Run(method, by_hand)
    whole.train(0, TOTAL_STEPS)
    for interruption in (0, 3, 14, 27):  # before the first step, in the ramp, annealing, frozen
        first = Run(method, by_hand)
        first.train(0, interruption)
        second = Run(method, by_hand, seed=1)
        second.load(first.checkpoint())
        assert second.sparsifier.step_count == interruption
        assert second.sparsifier.sparsity == first.sparsifier.sparsity
        second.train(interruption, TOTAL_STEPS)
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(tensor, second.model.state_dict()[name]), (interruption, name)
        for name, mask in whole.sparsifier.masks().items():
            assert torch.equal(mask.hard, second.sparsifier.masks()[name].hard)
            assert torch.equal(mask.soft, second.sparsifier.masks()[name].soft)
    whole.sparsifier.finalize()
    second.sparsifier.finalize()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


def test_a_saved_state_does_not_change_with_the_training() -> None:
    run = Run(Spartan(sparsity=0.8))
    run.train(0, 10)
    state = run.sparsifier.state_dict()
    before = {name: {k: v.clone() for k, v in mask.items()} for name, mask in state["masks"].items()}
    solver = [tensor.clone() for tensor in state["solver"]]
    run.train(10, 14)
    assert all(torch.equal(a, b) for a, b in zip(solver, state["solver"], strict=True))
    for name, mask in before.items():
        assert all(torch.equal(value, state["masks"][name][key]) for key, value in mask.items())


def test_states_of_version_1_are_read() -> None:
    """They leave out what a merged mask no longer has."""
    for steps in (12, 28):
        first, second = Run(Spartan(sparsity=0.8)), Run(Spartan(sparsity=0.8), seed=1)
        first.train(0, steps)
        state = first.checkpoint()
        old = state["sparsifier"]
        assert old["frozen"] == (steps == 28)
        for mask in old["masks"].values() if old["frozen"] else ():
            assert bool((mask.pop("soft") == 1).all())
        old["version"] = 1
        second.load(state)
        for run in (first, second):
            run.train(steps, TOTAL_STEPS)
        for name, tensor in first.model.state_dict().items():
            assert torch.equal(tensor, second.model.state_dict()[name]), name


def refused(state: Any, message: str, method: Method | None = None) -> None:
    """Check that `state` is refused with `message` and nothing is half-loaded."""
    run = Run(method or Spartan(sparsity=0.8))
    run.train(0, 8)
    before = run.sparsifier.state_dict()
    with pytest.raises(ValueError, match=message):
        run.sparsifier.load_state_dict(state)
    assert flat(run.sparsifier.state_dict()) == flat(before)


def flat(state: Any) -> Any:
    """A state that can be compared."""
    if isinstance(state, dict):
        return {key: flat(part) for key, part in state.items()}
    if isinstance(state, (list, tuple)):
        return [flat(part) for part in state]
    return state.tolist() if isinstance(state, torch.Tensor) else state


def test_checkpoints_of_other_trainings_are_refused_by_name() -> None:
    state = Run(Spartan(sparsity=0.8)).sparsifier.state_dict()
    refused(state, "its method is 'Spartan', here it is 'GMP'", GMP(sparsity=0.8))
    refused(state, "its settings is .*'sparsity': 0.8.*, here", Spartan(sparsity=0.7))
    refused({**state, "version": 99}, "its version is 99, here it is 2")
    refused({**state, "total_steps": 7}, "its total_steps is 7, here it is 30")
    refused({k: v for k, v in state.items() if k != "solver"}, "state must have the entries")
    refused([1], "state must have the entries .* got list")


def test_a_state_made_with_the_published_settings_goes_on_under_them_alone() -> None:
    """As those of trainings that began when they were the defaults; the message has what to set."""
    first, second = Run(Spartan.paper(sparsity=0.8)), Run(Spartan.paper(sparsity=0.8), seed=1)
    first.train(0, 12)
    second.load(first.checkpoint())
    for run in (first, second):
        run.train(12, TOTAL_STEPS)
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    theirs = r"\{'beta': 10.0, 'beta_units': 'paper', 'preserve_scale': False\}"
    ours = r"\{'beta': 4.0, 'beta_units': 'threshold', 'preserve_scale': True\}"
    refused(Run(Spartan.paper(sparsity=0.8)).sparsifier.state_dict(), f"its settings is {theirs}, here it is {ours}")


def test_checkpoints_of_other_models_are_refused_by_name() -> None:
    state = Run(Spartan(sparsity=0.8)).sparsifier.state_dict()
    conv = state["masks"]["0.weight"]
    refused({**state, "masks": {"0.weight": conv}}, r"it masks \['0.weight'\], here \['0.weight', '3.weight'\]")
    wrong_shape = {**state["masks"], "3.weight": {**conv}}
    refused({**state, "masks": wrong_shape}, r"of '3.weight' has shape \(6, 1, 3, 3\), here \(18, 96\)")
    for key in ("beta", "soft"):
        lacking = {**state["masks"], "3.weight": {k: v for k, v in state["masks"]["3.weight"].items() if k != key}}
        refused({**state, "masks": lacking}, f"state of '3.weight' has a wrong entry '{key}'")
    hard = state["masks"]["3.weight"]["hard"].float()
    refused(
        {**state, "masks": {**state["masks"], "3.weight": {**state["masks"]["3.weight"], "hard": hard}}},
        "state of '3.weight' has a wrong entry 'hard': its dtype is torch.float32",
    )
    refused({**state, "masks": {**state["masks"], "3.weight": 3}}, "state of '3.weight' must be a dict; got int")
    refused({**state, "step": "eight"}, "state has a wrong entry 'step': 'eight'; it must be of type int")
    missing = {**state["masks"], "3.weight": {"soft": state["masks"]["3.weight"]["soft"]}}
    refused({**state, "masks": missing}, "state of '3.weight' has a wrong entry 'beta'")
    unknown = {**state["masks"], "3.weight": {**state["masks"]["3.weight"], "extra": torch.ones(())}}
    refused({**state, "masks": unknown}, "state of '3.weight' has a wrong entry 'extra'")
    refused({**state, "targets": [1]}, r"another model: budgets \[1\], here \[")
    refused({**state, "solver": [torch.zeros(2)]}, "state has a wrong entry 'solver'")
    refused({**state, "solver": []}, r"state must have 1 entries in 'solver'; got \[\]")


@pytest.mark.parametrize("initial", ["x", None, True, float("nan"), -1.0, 0, 1e9])
def test_a_first_budget_that_cannot_be_is_refused(initial: Any) -> None:
    state = Run(Spartan(sparsity=0.8)).sparsifier.state_dict()
    message = rf"wrong entry 'initial': {initial!r}; it must be a number in \(0, 1782.0\]"
    refused({**state, "step": 3, "initial": [initial]}, message.replace("1782.0", r"1782(.0)?"))


@pytest.mark.parametrize("key", ["soft", "beta", "scale"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5])
def test_masks_out_of_their_range_are_refused(key: str, value: float) -> None:
    method = Spartan(sparsity=0.8, preserve_scale=True)
    state = Run(method).sparsifier.state_dict()
    state["masks"]["3.weight"][key].view(-1)[-1] = value
    allowed = r"in \[0, 1\]" if key == "soft" else "finite and at least 0"
    refused(state, f"state of '3.weight' has a wrong entry '{key}': 1 values are not {allowed}", method)


def test_entries_of_the_wrong_type_are_refused() -> None:
    state = Run(Spartan(sparsity=0.8)).sparsifier.state_dict()
    refused({**state, "step": -3}, "wrong entry 'step': -3; it must be at least 0")
    refused({**state, "step": True}, "wrong entry 'step': True; it must be of type int")
    refused({**state, "solved": ["no"]}, "wrong entry 'solved': 'no'; it must be of type bool")
    refused({**state, "solved": "n"}, "wrong entry 'solved': 'n'; it must be of type bool")
    state["masks"]["3.weight"]["soft"] = torch.ones(18, 96, dtype=torch.int64)
    refused(state, "state of '3.weight' has a wrong entry 'soft': its dtype is torch.int64")
    state["masks"]["3.weight"]["soft"] = torch.full((18, 96), 1.5)
    refused(state, "state of '3.weight' has a wrong entry 'soft': 1728 values are not in")
