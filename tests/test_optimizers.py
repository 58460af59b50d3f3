"""Every optimizer of PyTorch, closures, several optimizers at once, skipped steps, and averages inside an optimizer."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from spartan import GMP, Powerpropagation, RigL, Sparsifier, Spartan
from spartan.methods import Method

STEPS = 12
METHODS: list[Method] = [
    Spartan(sparsity=0.7, beta=4.0, beta_units="threshold", preserve_scale=True),
    RigL(sparsity=0.7, interval=3, block_size=2, fraction=0.5),
]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)

Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
OF_TORCH: dict[str, Make] = {
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.02),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.02, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.02),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1, t0=4),
    "Muon": lambda p: torch.optim.Muon([w for w in p if w.dim() == 2], lr=0.02),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.02),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.05),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9, nesterov=True),
}
REFUSED = {"LBFGS", "SparseAdam"}  # the latter by itself: it takes sparse gradients alone


class ScheduleFree(torch.optim.Optimizer):
    """Defazio et al. 2024, SGD: steps on z, gradients at y between z and x, the average of the z, shown by `eval`."""

    def __init__(self, parameters: Any, lr: float = 0.1, beta: float = 0.9) -> None:
        super().__init__(parameters, {"lr": lr, "beta": beta, "k": 0, "train_mode": True})

    def train(self) -> None:
        """Let parameters be y."""
        self._move(True)

    def eval(self) -> None:
        """Let parameters be x."""
        self._move(False)

    def _move(self, train_mode: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] is not train_mode:
                beta = group["beta"]
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.data.lerp_(self.state[p]["z"], 1 - beta if train_mode else 1 - 1 / beta)
                group["train_mode"] = train_mode

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """One step of z, and of the average."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            assert group["train_mode"], "step() is for train mode"
            group["k"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                z = self.state[p].setdefault("z", p.detach().clone())
                share = 1 / group["k"]
                p.lerp_(z, share).add_(p.grad, alpha=group["lr"] * (group["beta"] * (1 - share) - 1))
                z.sub_(p.grad, alpha=group["lr"])
        return loss


ALL: dict[str, Make] = {
    **OF_TORCH,
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.02, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9, fused=True),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.05, fused=True),
    "schedule-free": ScheduleFree,
}

pytestmark = pytest.mark.usefixtures("one_thread")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 4))


class Run:
    """A network in training, its masks moved by hooks or by hand, the gradient computed before a step or in it."""

    def __init__(self, method: Method, *makes: tuple[Make, slice], way: str = "hooks", clip: float = 1.0) -> None:
        self.model = network()
        self.way, self.clip = way, clip
        self.sparsifier = Sparsifier(self.model, method, STEPS)
        parameters = list(self.model.parameters())
        self.optimizers = [make(parameters[part]) for make, part in makes]
        if way != "hand":
            self.sparsifier.attach(*self.optimizers)

    def backward(self, step: int) -> torch.Tensor:
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
        self.model.zero_grad()
        loss = functional.cross_entropy(self.model(x), x[:, :4].argmax(1))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        return loss

    def step(self, step: int, order: slice = slice(None)) -> None:
        first, *others = self.optimizers[order]
        if self.way == "closure":
            first.step(lambda: self.backward(step))  # type: ignore[arg-type, return-value]
        elif self.way == "named closure":
            first.step(closure=lambda: self.backward(step))  # type: ignore[arg-type, return-value]
        else:
            self.backward(step)
            if self.way == "hand":
                self.sparsifier.correct_gradients()
            first.step()
        for optimizer in others:
            optimizer.step()
        if self.way == "hand":
            self.sparsifier.step(*self.optimizers)

    def train(self, steps: int = STEPS, order: slice = slice(None)) -> Run:
        for step in range(self.sparsifier.step_count, self.sparsifier.step_count + steps):
            self.step(step, order)
        return self


def require_same(run: Run, other: Run) -> None:
    assert run.sparsifier.step_count == other.sparsifier.step_count
    for a, b in zip(run.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
    masks = other.sparsifier.masks()
    for name, mask in run.sparsifier.masks().items():
        assert torch.equal(mask.soft, masks[name].soft) and torch.equal(mask.hard, masks[name].hard)


WHOLE = slice(None)


def test_every_optimizer_of_torch_is_tried_or_refused() -> None:
    there = {
        name
        for name, kind in inspect.getmembers(torch.optim, inspect.isclass)
        if issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }
    assert there == set(OF_TORCH) | REFUSED


@each_method
@pytest.mark.parametrize("name", ALL)
def test_hooks_closures_and_hand_give_the_same_bits(name: str, method: Method) -> None:
    """Gradients are corrected once, after clipping, and masks move after the step, wherever backward is called."""
    by_hand = Run(method, (ALL[name], WHOLE), way="hand").train()
    assert by_hand.sparsifier.frozen
    fresh = list(network().parameters())
    assert any(not torch.equal(a, b) for a, b in zip(by_hand.model.parameters(), fresh, strict=True))
    for way in ("hooks", "closure", "named closure"):
        require_same(Run(method, (ALL[name], WHOLE), way=way).train(), by_hand)
    by_hand.sparsifier.finalize()
    assert by_hand.sparsifier.sparsity == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize("name", ALL)
def test_grown_weights_have_what_the_optimizer_starts_from(name: str) -> None:
    """RigL grows weights; the state of each is that of a weight that was never trained, but for what divides steps."""
    run = Run(RigL(sparsity=0.7, interval=3, fraction=0.5), (ALL[name], WHOLE)).train(2)
    before = {key: mask.hard.clone() for key, mask in run.sparsifier.masks().items()}
    run.train(1)
    optimizer, grown = run.optimizers[0], 0
    for tensor in run.sparsifier._masks.tensors:
        new = tensor.hard & ~before[tensor.name]
        grown += int(new.sum())
        for key, value in optimizer.state[tensor.weight].items():
            if isinstance(value, torch.Tensor) and value.shape == tensor.weight.shape:
                start = {("Rprop", "step_size"): 0.01, ("Adagrad", "sum"): 0.1}.get((name, key), 0.0)
                if key in ("exp_avg_sq", "square_avg", "sum", "exp_inf"):  # as of settled weights: see test_moments
                    assert bool((value[new] > start).all()), key
                else:
                    assert torch.equal(value[new], torch.full_like(value[new], start)), key
    assert grown > 0


def test_lbfgs_is_refused() -> None:
    model = network()
    sparsifier = Sparsifier(model, METHODS[0], STEPS)
    with pytest.raises(ValueError, match="optimizer must compute one gradient for each step; LBFGS"):
        sparsifier.attach(torch.optim.LBFGS(model.parameters()))


class Twice(torch.optim.SGD):
    """Looks at the gradient of two points, as sharpness-aware methods do."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """A step."""
        closure()
        return super().step(closure)


class Never(torch.optim.SGD):
    """Has its own idea of a step."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """A step."""
        return super().step()


@pytest.mark.parametrize(
    ("kind", "message"), [(Twice, "more than once in a step"), (Never, "did not call the closure")]
)
def test_closures_that_run_not_just_once_are_refused(kind: Any, message: str) -> None:
    run = Run(METHODS[0], (lambda p: kind(p, lr=0.1), WHOLE), way="closure")
    with pytest.raises(RuntimeError, match=f"{kind.__name__} .*{message}"):
        run.step(0)
    assert run.sparsifier.step_count == 0


class Logging(torch.optim.AdamW):
    """Does something besides, and leaves the step to its base class."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """A step."""
        self.count = getattr(self, "count", 0) + 1
        return super().step(closure)


@pytest.mark.parametrize("way", ["hooks", "closure"])
def test_a_step_that_calls_that_of_its_base_class_is_one_step(way: str) -> None:
    """Both run hooks. After a step that was broken off the next one is whole again."""
    torch.optim.AdamW(network().parameters()).step()  # PyTorch hooks a class when it is first used
    run = Run(METHODS[0], (lambda p: Logging(p, lr=0.02), WHOLE), way=way)
    run.train(4)
    group = run.optimizers[0].param_groups[0]
    group["lr"], rate = "broken", group["lr"]
    with pytest.raises(TypeError):
        run.step(100)
    group["lr"] = rate
    other = Run(METHODS[0], (ALL["AdamW"], WHOLE)).train(4)
    run.model.load_state_dict(other.model.state_dict())
    run.optimizers[0].load_state_dict(copy.deepcopy(other.optimizers[0].state_dict()))
    require_same(run.train(8), other.train(8))


class Wrapper(torch.optim.Optimizer):
    """Looks like an optimizer and has one, as those of Accelerate and Lightning do."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """Another's."""
        return self.optimizer.step(closure)


def test_wrapped_optimizers_are_looked_into() -> None:
    run, other = (Run(METHODS[0], (ALL["AdamW"], WHOLE), way=way) for way in ("hand", "hooks"))
    run.way = "hooks"
    run.sparsifier.attach(Wrapper(Wrapper(run.optimizers[0])))
    require_same(run.train(3), other.train(3))
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer; got Wrapper"):
        Sparsifier(network(), METHODS[0], STEPS).attach(Wrapper("none"))


@each_method
@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)], ids=["forwards", "backwards"])
@pytest.mark.parametrize("parts", [[slice(0, 2), slice(2, 6)], [slice(i, i + 1) for i in (0, 2)]], ids=["two", "each"])
def test_several_optimizers_are_as_one(method: Method, order: slice, parts: list[slice]) -> None:
    """Masks move once in a round, whichever steps last; one for each parameter is allowed."""
    run = Run(method, *((ALL["AdamW"], part) for part in parts)).train(order=order)
    trained = [p for part in parts for p in list(range(6))[part]]
    one: Make = lambda p: torch.optim.AdamW([list(p)[i] for i in trained], lr=0.02)  # noqa: E731
    require_same(run, Run(method, (one, WHOLE)).train())
    require_same(run, Run(method, *((ALL["AdamW"], part) for part in parts), way="hand").train(order=order))


def test_the_first_of_several_may_be_given_a_closure() -> None:
    parts = (ALL["AdamW"], slice(0, 2)), (ALL["SGD"], slice(2, 6))
    require_same(Run(METHODS[0], *parts, way="closure").train(), Run(METHODS[0], *parts).train())


def test_a_masked_weight_in_no_attached_optimizer_is_an_error() -> None:
    model = network()
    sparsifier = Sparsifier(model, METHODS[0], STEPS)
    first, second = torch.optim.SGD(model[0].parameters()), torch.optim.SGD(model[2].parameters())
    dense = torch.optim.SGD(model[4].parameters())
    with pytest.raises(ValueError, match=r"masked weight '2\.weight' is in none of the attached optimizers"):
        sparsifier.attach(first)
    with pytest.raises(ValueError, match=r"optimizer number 3 \(SGD\) has none of the masked weights"):
        sparsifier.attach(first, second, dense)
    with pytest.raises(TypeError, match=r"optimizer must be .*got none"):
        sparsifier.attach()
    with pytest.raises(ValueError, match="Powerpropagation changes weights for one optimizer's step; got 2"):
        Sparsifier(network(), Powerpropagation(GMP(sparsity=0.5)), STEPS).attach(first, second)
    model[2].weight.requires_grad_(False)
    sparsifier.attach(first)  # what is not trained needs no optimizer


@pytest.mark.parametrize("inside", [False, True], ids=["a loss each", "steps inside backward"])
def test_steps_after_different_backward_passes_are_refused(inside: bool) -> None:
    run = Run(METHODS[0], (ALL["SGD"], slice(0, 2)), (ALL["SGD"], slice(2, 6)))
    if inside:
        for optimizer in run.optimizers:
            weight = optimizer.param_groups[0]["params"][0]
            weight.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    with pytest.raises(RuntimeError, match="attached optimizers must each step once after a common backward pass"):
        for step in range(2):
            for optimizer in run.optimizers:
                run.backward(step)
                if not inside:
                    optimizer.step()
    assert run.sparsifier.step_count == 0


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("broken", [0, 1])
def test_a_round_in_which_one_is_skipped_moves_no_masks(fused: bool, broken: int) -> None:
    """GradScaler skips the optimizer whose gradients overflow; the other's weights stay finite and go on."""

    def unclipped(p: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(p, lr=0.02, fused=fused)

    run = Run(METHODS[0], (unclipped, slice(0, 2)), (unclipped, slice(2, 6)))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=10**6)
    counts = []
    for step in range(8):
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
        run.model.zero_grad()
        scaler.scale(functional.cross_entropy(run.model(x), x[:, :4].argmax(1))).backward()
        before = run.sparsifier.masks()["0.weight"].soft.clone()
        if step in (0, 3, 4):
            run.optimizers[broken].param_groups[0]["params"][0].grad[0, 0] = float("inf")
        for optimizer in run.optimizers:
            scaler.unscale_(optimizer)
        for optimizer in run.optimizers:
            scaler.step(optimizer)
        scaler.update()
        counts.append(run.sparsifier.step_count)
        assert all(bool(p.isfinite().all()) for p in run.model.parameters())
        if step in (0, 3, 4):
            assert torch.equal(run.sparsifier.masks()["0.weight"].soft, before)
    assert counts == [0, 1, 2, 2, 2, 3, 4, 5]


@each_method
def test_averages_inside_an_optimizer_are_sparse(method: Method) -> None:
    """A schedule-free optimizer shows the average of its iterates in eval mode: zero where masks are fixed at zero."""
    run = Run(method, (ScheduleFree, WHOLE)).train()
    optimizer: Any = run.optimizers[0]
    optimizer.eval()
    for tensor in run.sparsifier._masks.tensors:
        dropped = ~tensor.expand(tensor.hard)
        assert bool(dropped.any()) and bool((tensor.weight[dropped] == 0).all())
    optimizer.train()
    run.sparsifier.finalize()
    optimizer.eval()
    zeros = sum(int((p == 0).sum()) for p in run.model.parameters())
    assert zeros / sum(p.numel() for p in run.model.parameters()) == pytest.approx(0.7, abs=0.01)


needs_ranks = pytest.mark.skipif(not dist.is_available(), reason="PyTorch was built without torch.distributed")


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@needs_ranks
@each_method
@pytest.mark.parametrize("way", ["hooks", "closure"])
def test_zero_redundancy_optimizer_is_as_the_one_inside(alone: None, method: Method, way: str) -> None:
    """Its state is that of the optimizer inside it, which resets must reach."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def sharded(p: Any) -> torch.optim.Optimizer:
        return ZeroRedundancyOptimizer(p, torch.optim.AdamW, lr=0.02)

    require_same(Run(method, (sharded, WHOLE), way=way).train(), Run(method, (ALL["AdamW"], WHOLE)).train())
