"""A world model of discs that collide: the graph of each step by gates and path sparsity, beside dense attention.

Balls, a paddle and distractors move in a box. A disc changes another's motion only where they collide within the
step; the paddle follows the action, and distractors pass through everything. The simulator knows the graph of each
step. Tokens of interventions (a wind on one ball) have to find whom they touch.

    python examples/layers/gated_attention.py --out examples/layers/results

It needs nothing but this package and matplotlib (`pip install '.[train]'`).
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples.layers.study import Record, Study, means, options
from spartan.layers import DualAscent, GatedAttention, InterventionTokens, causal_graph, path_sparsity

BALLS, DISTRACTORS = 3, 2
PADDLE, SOLID = BALLS, BALLS + 1
OBJECTS = SOLID + DISTRACTORS
TOKENS = OBJECTS + 1  # the action is a token of its own, the last
FEATURES = 4 + TOKENS  # place, velocity or action, and which token it is
RADIUS, STIFFNESS, SUBSTEPS, FRICTION = 0.25, 0.5, 4, 0.95
SPEED, WIND = 0.15, 0.1  # in half widths of the box a step
STEPS_OF_EPISODE = 20
DIRECTIONS = 8  # of winds; those of even number are seen in training
SEEN = [ball * DIRECTIONS + direction for ball in range(BALLS) for direction in range(0, DIRECTIONS, 2)]


@dataclass
class Transitions:
    """Steps of the simulator: tokens `[n, TOKENS, FEATURES]`, the change of the state `[n, OBJECTS, 4]`, the graph of
    the step `[n, OBJECTS, TOKENS]`, the number of the wind `[n]` among those of training, or -1."""

    tokens: Tensor
    change: Tensor
    graph: Tensor
    wind: Tensor

    def __getitem__(self, index: Tensor | slice) -> Transitions:
        return Transitions(*(getattr(self, f.name)[index] for f in fields(self)))


def advance(state: Tensor, action: Tensor, push: Tensor) -> tuple[Tensor, Tensor]:
    """State `[n, OBJECTS, 4]` after a step, and which token each object's new state comes from."""
    place, velocity = state.split(2, dim=-1)
    index = torch.arange(OBJECTS)
    moved = (index[:, None] < PADDLE) & (index < SOLID) & (index[:, None] != index)  # the paddle moves as it is told
    velocity = (FRICTION * velocity + push).where(index[:, None] != PADDLE, action[:, None])
    reach = torch.eye(TOKENS).repeat(len(state), 1, 1)
    reach[:, PADDLE, -1] = 1
    for _ in range(SUBSTEPS):
        place = place + velocity / SUBSTEPS
        wall = place.clamp(RADIUS - 1, 1 - RADIUS) - place
        gap = place[:, :, None] - place[:, None]
        distance = gap.norm(dim=-1)
        depth = (1 - distance / (2 * RADIUS)).clamp_min(0) * moved
        force = (depth / distance.clamp_min(1e-6))[..., None] * gap
        velocity = velocity + STIFFNESS / SUBSTEPS * (force.sum(2) + wall / RADIUS) * (index[:, None] != PADDLE)
        touched = functional.pad((depth > 0).float(), (0, 1, 0, 1))
        reach = ((reach + touched @ reach) > 0).float()
    return torch.cat([place, velocity], dim=-1), reach[:, :OBJECTS] > 0


def simulate(episodes: int, seed: int, winds: Sequence[int], calm: float = 0.0) -> Transitions:
    """Episodes that each have one of `winds` (ball and direction), or none with a probability of `calm`."""
    generator = torch.Generator().manual_seed(seed)
    state = 2 * torch.rand(episodes, OBJECTS, 4, generator=generator) - 1
    state = state * torch.tensor([1 - RADIUS, 1 - RADIUS, SPEED, SPEED])
    number = torch.randint(len(winds), (episodes,), generator=generator)
    which = torch.tensor(winds)[number]
    angle = 2 * math.pi / DIRECTIONS * (which % DIRECTIONS)
    blown = torch.rand(episodes, generator=generator) >= calm
    force = WIND * torch.stack([angle.cos(), angle.sin()], dim=-1) * blown[:, None]
    push = functional.one_hot(which // DIRECTIONS, OBJECTS)[..., None] * force[:, None]
    identity = torch.eye(TOKENS).expand(episodes, -1, -1)
    steps = []
    for _ in range(STEPS_OF_EPISODE):
        noise = SPEED * torch.randn(episodes, 2, generator=generator)
        action = noise - 0.2 * state[:, PADDLE, :2]  # back to the middle
        moving = torch.cat([state, functional.pad(action, (2, 0))[:, None]], dim=1)
        after, graph = advance(state, action, push)
        tokens = torch.cat([moving, identity], dim=-1)
        steps.append(Transitions(tokens, after - state, graph, number.where(blown, torch.tensor(-1))))
        state = after
    return Transitions(*(torch.cat([getattr(step, f.name) for step in steps]) for f in fields(Transitions)))


class DenseAttention(nn.Module):
    """What `GatedAttention` is without gates; returns the attention in their place."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        queries, keys, values = self.project(x).chunk(3, dim=-1)
        logits = queries @ keys.transpose(-1, -2) / math.sqrt(x.shape[-1]) + mask[:, None]
        weights = logits.softmax(-1)
        return self.out(weights @ values), weights


class World(nn.Module):
    """A transformer over the tokens of a scene and of an intervention; predicts the change of each object's state."""

    def __init__(self, gated: bool, dim: int, layers: int, scale: Tensor) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(FEATURES, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.interventions = InterventionTokens(len(SEEN), dim)
        attention = GatedAttention if gated else DenseAttention
        self.attentions = nn.ModuleList(attention(dim) for _ in range(layers))
        self.mixers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
            for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4))
        self.register_buffer("scale", scale)

    def forward(self, tokens: Tensor, wind: Tensor, mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        x, mask = self.interventions(self.embed(tokens), wind, mask)
        gates = []
        for attention, norm, mixer in zip(self.attentions, self.norms, self.mixers, strict=True):
            read, gate = attention(norm(x), mask)
            x = x + read
            x = x + mixer(x)
            gates.append(gate)
        return self.head(x[:, :OBJECTS]), gates

    def errors(self, predicted: Tensor, batch: Transitions) -> Tensor:
        """Squared error of each object, in units of the variance of its change, `[n, OBJECTS]`."""
        return ((predicted - batch.change / self.scale) ** 2).mean(-1)
