"""A world model of discs that collide: the graph of each step by gates and path sparsity, beside dense attention.

Balls, a paddle and distractors move in a narrow ring. A disc changes a ball's motion only where they overlap within
the step: they push and rub. The paddle follows the action; distractors pass through everything. The simulator knows
the graph of each step. Tokens of interventions (a wind on one ball) have to find whom they touch.

    python examples/layers/gated_attention.py --out examples/layers/results

It needs nothing but this package and matplotlib (`pip install '.[train]'`).
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples.layers.study import Record, Study, means, options
from spartan.layers import DualAscent, GatedAttention, InterventionTokens, causal_graph, path_sparsity

BALLS, DISTRACTORS = 2, 3
PADDLE, SOLID = BALLS, BALLS + 1
OBJECTS = SOLID + DISTRACTORS
TOKENS = OBJECTS + 1  # the action is a token of its own; that of the intervention comes after it
WAVES = 3  # multiples of the angle that a token has sine and cosine of
FEATURES = 2 * WAVES + 1 + TOKENS  # place, velocity or action, and which token it is
RADIUS, STIFFNESS, GRIP, FRICTION, SUBSTEPS = 0.15, 0.5, 0.5, 0.95, 4
SPEED, EPISODE = 0.2, 20  # in half turns of the ring a step; steps
WINDS = [(ball, push) for ball in range(BALLS) for push in (-0.12, -0.06, 0.06, 0.12)]
SEEN, UNSEEN = WINDS[0::2], WINDS[1::2]


@dataclass
class Transitions:
    """Steps of the simulator.

    Attributes:
        tokens: `[n, TOKENS, FEATURES]`.
        change: of place and velocity, `[n, OBJECTS, 2]`.
        graph: whether the new state of an object depends on a token, `[n, OBJECTS, TOKENS + 1]`.
        wind: its number `[n]`, or -1.
    """

    tokens: Tensor
    change: Tensor
    graph: Tensor
    wind: Tensor

    def __getitem__(self, index: Tensor | slice) -> Transitions:
        return Transitions(*(getattr(self, f.name)[index] for f in fields(self)))


def advance(place: Tensor, velocity: Tensor, action: Tensor, push: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Place and velocity `[n, OBJECTS]` after a step, and the graph of the step."""
    index = torch.arange(OBJECTS)
    paddle = index == PADDLE
    # the paddle moves as it is told, whatever it hits
    touchable = (index[:, None] < PADDLE) & (index < SOLID) & (index[:, None] != index)
    velocity = torch.where(paddle, action[:, None], FRICTION * velocity + push)
    graph = torch.eye(OBJECTS, TOKENS + 1).repeat(len(place), 1, 1)
    graph[:, PADDLE, OBJECTS] = 1
    graph[:, :, -1] = (push != 0).float()
    for _ in range(SUBSTEPS):
        place = place + velocity / SUBSTEPS
        gap = torch.remainder(place[:, :, None] - place[:, None] + 1, 2) - 1
        touching = ((gap.abs() < 2 * RADIUS) & touchable).float()
        pushed = touching * gap.sign() * (1 - gap.abs() / (2 * RADIUS))
        rubbed = touching * (velocity[:, None] - velocity[:, :, None])
        velocity = velocity + (STIFFNESS * pushed + GRIP * rubbed).sum(2) / SUBSTEPS
        graph = ((graph + touching @ graph) > 0).float()
    return place, velocity, graph > 0


def observed(place: Tensor, velocity: Tensor, action: Tensor) -> Tensor:
    """Tokens `[n, TOKENS, FEATURES]`; the place by sines and cosines, in which nearness is a scalar product."""
    angles = math.pi * place[..., None] * torch.arange(1, WAVES + 1)
    objects = torch.cat([angles.sin(), angles.cos(), velocity[..., None]], dim=-1)
    moves = functional.pad(action[:, None, None], (2 * WAVES, 0))
    return torch.cat([torch.cat([objects, moves], dim=1), torch.eye(TOKENS).expand(len(place), -1, -1)], dim=-1)


def simulate(episodes: int, seed: int, winds: Sequence[tuple[int, float]], calm: float = 0.0) -> Transitions:
    """Episodes that each have one of `winds` from end to end, or none with a probability of `calm`."""
    generator = torch.Generator().manual_seed(seed)
    place, velocity = (2 * torch.rand(2, episodes, OBJECTS, generator=generator) - 1).unbind()
    velocity = SPEED * velocity
    wind = torch.arange(episodes) % len(winds)
    ball, strength = torch.tensor([w[0] for w in winds])[wind], torch.tensor([w[1] for w in winds])[wind]
    blows = torch.rand(episodes, generator=generator) >= calm
    push = functional.one_hot(ball, OBJECTS) * (strength * blows)[:, None]
    wind = torch.where(blows, wind, -1)
    steps = []
    for _ in range(EPISODE):
        action = SPEED * torch.randn(episodes, generator=generator)
        tokens = observed(place, velocity, action)
        new_place, new_velocity, graph = advance(place, velocity, action, push)
        change = torch.stack([new_place - place, new_velocity - velocity], dim=-1)
        steps.append(Transitions(tokens, change, graph, wind))
        place, velocity = new_place, new_velocity
    return Transitions(*(torch.cat([getattr(step, f.name) for step in steps]) for f in fields(Transitions)))


class DenseAttention(nn.Module):
    """`GatedAttention` without gates; returns the attention in their place."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """As `GatedAttention.forward`."""
        queries, keys, values = self.project(x).chunk(3, dim=-1)
        weights = (queries @ keys.transpose(-1, -2) / math.sqrt(x.shape[-1]) + mask[:, None]).softmax(-1)
        return self.out(weights @ values), weights


class World(nn.Module):
    """A transformer over the tokens of a scene and of its intervention, which predicts the change of each object."""

    def __init__(self, attention: Callable[[int], nn.Module], dim: int, layers: int, scale: Tensor) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES, dim)
        self.interventions = InterventionTokens(len(SEEN), dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))
        self.attentions = nn.ModuleList(attention(dim) for _ in range(layers))
        self.mixers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
            for _ in range(layers)
        )
        self.head = nn.Linear(dim, 2)
        self.scale: Tensor
        self.register_buffer("scale", scale)

    def forward(self, tokens: Tensor, wind: Tensor, mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Predicted change in units of `scale`, `[n, OBJECTS, 2]`, and the gates (or attention) of each layer."""
        x, mask = self.interventions(self.embed(tokens), wind, mask)
        gates = []
        for norm, attention, mixer in zip(self.norms, self.attentions, self.mixers, strict=True):
            read, gate = attention(norm(x), mask)
            x = x + read
            x = x + mixer(x)
            gates.append(gate)
        return self.head(x[:, :OBJECTS]), gates

    def errors(self, batch: Transitions, mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Squared error of each object `[n, OBJECTS]`, in parts of the variance of its change; the gates."""
        predicted, gates = self(batch.tokens, batch.wind, mask)
        return ((predicted - batch.change / self.scale) ** 2).mean(-1), gates


def fit(
    model: World, parameters: Sequence[Record], data: Transitions, steps: int, rate: float, seed: int,
    objective: Callable[[Tensor, list[Tensor]], Tensor] = lambda loss, gates: loss,
) -> None:  # fmt: skip
    """Train groups of parameters on random batches; the rate of learning rises, stays, and falls."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(parameters, rate)
    shape = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / 50, 3 * (1 - i / steps)))
    model.train()
    for _ in range(steps):
        batch = data[torch.randint(len(data.wind), (BATCH,), generator=generator)]
        errors, gates = model.errors(batch)
        optimizer.zero_grad()
        objective(errors.mean(), gates).backward()
        nn.utils.clip_grad_norm_([p for group in parameters for p in group["params"]], 1.0)
        optimizer.step()
        shape.step()


def groups(model: World, rate: float) -> list[Record]:
    """Parameters of a model for `fit`; those of the gates learn faster."""
    named = dict(model.named_parameters())
    gates = [name for name in named if ".gate." in name or name.endswith("openness")]
    rest = [name for name in named if name not in gates]
    parts = [(rest, rate), (gates, 10 * rate)]
    return [{"params": [named[name] for name in names], "lr": at} for names, at in parts if names]


BATCH = 64
OTHERS = ~torch.eye(OBJECTS, TOKENS + 1, dtype=torch.bool)


def distance(gates: Sequence[Tensor], truth: Tensor) -> float:
    """Structural Hamming distance: edges that are wrong in a step, on the average."""
    found = causal_graph(gates)[:, :OBJECTS]
    return float(((found != truth) & OTHERS).sum((1, 2)).float().mean())


@torch.no_grad()
def evaluate(model: World, held: Transitions, dense: bool) -> Record:
    """Errors of the balls and of the graph, also with distractors removed, and with others than in training."""
    model.eval()
    errors, gates = model.errors(held)
    if dense:
        levels = torch.linspace(0.02, 1, 50)
        wrong = min(distance([(gate > level).float() for gate in gates], held.graph) for level in levels)
    else:
        wrong = distance(gates, held.graph)
    removed = torch.zeros(held.tokens.shape[:2])
    removed[:, SOLID:OBJECTS] = -math.inf
    changed = held.tokens.clone()
    changed[:, SOLID:OBJECTS, 2 * WAVES] *= 3
    moved = Transitions(changed, held.change, held.graph, held.wind)
    shifts = {"error": (held, None), "removed": (held, removed), "changed": (moved, None)}
    found: Record = {key: float(model.errors(*case)[0][:, :BALLS].mean()) for key, case in shifts.items()}
    return {**found, "all": float(errors.mean()), "wrong": wrong}


def adapt(model: World, episodes: int, steps: int, seed: int) -> float:
    """Error of the balls in winds that training had not, when only their tokens were learned from few episodes.

    With no episodes there is no token.
    """
    held = simulate(20 * len(UNSEEN), 2000 + seed, UNSEEN)
    if episodes:
        tokens = InterventionTokens(len(UNSEEN), DIM)
        with torch.no_grad():
            tokens.tokens.copy_(model.interventions.tokens.mean(0))
        model.interventions = tokens  # the rest of the model is given to no optimizer
        few = simulate(episodes * len(UNSEEN), 1000 + seed, UNSEEN)
        fit(model, [{"params": [tokens.tokens]}], few, steps, 2e-2, seed)
    else:
        held.wind.fill_(-1)
    model.eval()
    with torch.no_grad():
        return float(model.errors(held)[0][:, :BALLS].mean())


def build(kind: str, seed: int, data: Transitions, start: World | None = None) -> World:
    """A model, with the weights of `start` where it has them."""
    torch.manual_seed(seed)
    attention = DenseAttention if kind == DENSE else partial(GatedAttention, temperature=TEMPERATURE, openness=OPENNESS)
    model = World(attention, DIM, LAYERS, data.change[:, :SOLID].std((0, 1)))
    if start is not None:
        model.load_state_dict(start.state_dict(), strict=False)
    return model


def run(model: World, kind: str, seed: int, data: Transitions, target: float, quick: bool) -> tuple[Record, float]:
    """Train a model, and measure it; also its error over all objects, which is what it was trained for."""
    ascent = DualAscent(target, rate=0.1, decay=0.95, limits=(0.005, 1e3))
    penalties = {PATHS: path_sparsity, EDGES: lambda gates: torch.stack(gates).mean()}

    def objective(loss: Tensor, gates: list[Tensor]) -> Tensor:
        return loss if kind == DENSE else ascent(loss, penalties[kind](gates))

    fit(model, groups(model, RATE / 2), data, 4 if quick else STEPS, RATE / 2, seed, objective)
    found = evaluate(model, simulate(100, 3000 + seed, SEEN, CALM), kind == DENSE)
    for episodes in (0, 5, 50):
        found[f"adapted_{episodes}"] = adapt(copy.deepcopy(model), episodes, 4 if quick else 200, seed)
    return found, found.pop("all")


DENSE, EDGES, PATHS = "dense", "gates, their mean", "gates, paths"
DIM, LAYERS, RATE = 48, 2, 2e-3
OPENNESS, TEMPERATURE = 4.0, 3.0
FIRST, STEPS, CALM, SLACK = 1000, 1400, 0.5, 1.5
ABOUT = (
    f"{BALLS} balls, a paddle and {DISTRACTORS} distractors in a ring; two layers of dim {DIM}. All three go on from"
    f" one dense model of {FIRST} steps for {STEPS} more, in batches of {BATCH}; gates keep the loss at {SLACK:g} times"
    " the dense one. Errors of the balls, in parts of the variance; edges that are wrong in a step, dense attention at"
    " its best threshold."
)


def draw(axes: Any, records: Sequence[Record]) -> None:
    """Errors under each change, side by side."""
    shown = {
        "error": "as in\ntraining", "removed": "distractors\nremoved", "changed": "distractors\nchanged",
        "adapted_0": "new wind,\nno token", "adapted_5": "new wind,\n5 episodes",
        "adapted_50": "new wind,\n50 episodes",
    }  # fmt: skip
    kinds = list(dict.fromkeys(r["model"] for r in records))
    for at, kind in enumerate(kinds):
        places = [place + (at - 1) * 0.27 for place in range(len(shown))]
        axes.bar(places, [means(records, key, model=kind) for key in shown], 0.25, label=kind)
    axes.set_xticks(range(len(shown)), shown.values(), fontsize=8)
    axes.set_ylabel("error of the balls / variance")
    axes.legend()


def main() -> None:
    """Train each model with each seed, and write the results."""
    settings = options(__doc__)
    study = Study(
        "gated_attention",
        {"model": "attention"},
        {
            "error": ("error", "{:.3f}"),
            "wrong": ("wrong edges", "{:.2f}"),
            "removed": ("distractors removed", "{:.3f}"),
            "changed": ("distractors changed", "{:.3f}"),
            "adapted_0": ("new wind, no token", "{:.3f}"),
            "adapted_5": ("new wind, 5 episodes", "{:.3f}"),
            "adapted_50": ("new wind, 50 episodes", "{:.3f}"),
        },
        ABOUT,
    )
    for seed in settings.seeds:
        data = simulate(10 if settings.quick else 2000, seed, SEEN, CALM)
        start = build(DENSE, seed, data)
        fit(start, groups(start, RATE), data, 4 if settings.quick else FIRST, RATE, seed)
        target = 1.0
        for kind in (DENSE, EDGES, PATHS):
            found, loss = run(build(kind, seed, data, start), kind, seed, data, target, settings.quick)
            study.add(seed, model=kind, **found)
            target = SLACK * loss if kind == DENSE else target
    study.finish(settings.out, draw)


if __name__ == "__main__":
    main()
