"""Sparse fine-tuning of a trained encoder: pairs of text, distillation, results that go on, the table."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from torch import Tensor, nn

pytest.importorskip("rich")

from bench import pretrained, tables
from bench.pretrained import METHODS, UNTRAINED, Batch, Distillation, Run, docstring_pairs, embed, make, planned
from spartan.methods import OneShot, Spartan

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = {"steps": 30, "batch_size": 8, "tokens": 5, "learning_rate": 1e-2, "warmup": 0.1}
WORDS = [[f"{a}{b}" for b in "abcdefgh"] for a in "pqrs"]


class Encoder(nn.Module):
    """A small stand-in for a BERT: embeddings, two linear layers, an output like transformers'."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.words = nn.Embedding(50, 24)
        self.encoder = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        assert attention_mask.shape == input_ids.shape
        return SimpleNamespace(last_hidden_state=self.encoder(self.words(input_ids)))


def tokenize(texts: list[str]) -> Batch:
    numbers = [[1 + sum(map(ord, word)) % 49 for word in text.split()][:5] for text in texts]
    tokens = torch.tensor([row + [0] * (5 - len(row)) for row in numbers])
    return Batch(tokens, (tokens > 0).long())


def pairs(count: int = 60) -> list[tuple[str, str]]:
    flat = [word for row in WORDS for word in row]
    return [
        (" ".join(flat[(i + k) % 32] for k in range(3)), " ".join(flat[(5 * i + k) % 32] for k in range(5)))
        for i in range(count)
    ]


def distillation(steps: int = 30) -> Distillation:
    return Distillation(Encoder, tokenize, pairs(), 20, {**RECIPE, "steps": steps}, "encoder.*.weight")


def test_pairs_are_the_first_paragraph_and_the_rest(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        '"""Module of a few words.\n\nIt says more about itself."""\n'
        'def f():\n    """Do this and that\n    at once.\n\n    And then do   something else."""\n'
        'def g():\n    """Too short.\n\n    One two three."""\n'
        'class C:\n    """Only one paragraph, without a rest."""\n'
    )
    (tmp_path / "b.py").write_text('"""Module of a few words.\n\nIt says more about itself."""\n')
    (tmp_path / "bad.py").write_text("def (:\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "c.py").write_text('"""Not of a test at all.\n\nWhatever it may say."""\n')
    found = docstring_pairs(tmp_path)
    assert sorted(found) == [
        ("Do this and that at once.", "And then do something else."),
        ("Module of a few words.", "It says more about itself."),
    ]
    assert docstring_pairs(tmp_path) == found


def test_embeddings_are_means_over_the_tokens_that_are_there() -> None:
    model = Encoder()
    short, padded = Batch(torch.tensor([[3, 4]]), torch.ones(1, 2)), Batch(torch.tensor([[3, 4, 9]]), torch.ones(1, 3))
    padded.mask[0, 2] = 0
    torch.testing.assert_close(embed(model, short), embed(model, padded))
    assert float(embed(model, short).norm()) == pytest.approx(1)


def test_training_brings_the_embeddings_back() -> None:
    task = distillation()
    assert task.evaluate(task.dense) == {"cosine": pytest.approx(1), "recall": task.evaluate(task.dense)["recall"]}
    pruned = task.measure(OneShot(sparsity=0.8, prune_at=0), 0, 0)
    trained = task.measure(OneShot(sparsity=0.8, prune_at=0), 30, 0)
    soft = task.measure(Spartan(sparsity=0.8), 30, 0)
    assert pruned["cosine"] + 0.05 < min(trained["cosine"], soft["cosine"]) < 1
    for record in (pruned, trained, soft):
        assert record["measured_sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert soft == task.measure(Spartan(sparsity=0.8), 30, 0)


def test_held_out_pairs_must_leave_some_to_train_on() -> None:
    for held_out in (0, 60):
        with pytest.raises(ValueError, match=f"held_out must be above 0 and below the 60 pairs; got {held_out}"):
            Distillation(Encoder, tokenize, pairs(), held_out, RECIPE, "encoder.*.weight")


def test_runs_are_made_once_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Run] = []
    out = tmp_path / "pretrained.json"
    monkeypatch.setattr(pretrained, "mini_lm", lambda recipe: distillation(recipe["steps"]))
    monkeypatch.setattr(pretrained, "SPARSITIES", (0.7,))
    monkeypatch.setattr(pretrained, "make", lambda run, task: (made.append(run), make(run, task))[1])
    pretrained.main(seeds=[0], out=out, steps=3)
    assert len(made) == len(METHODS) == len(planned())
    content = json.loads(out.read_text(encoding="utf-8"))
    by_method = {record["method"]: record for record in content["results"]}
    assert by_method[UNTRAINED]["steps"] == 0 and by_method["Spartan"]["steps"] == 3
    assert by_method["Spartan, published"]["settings"]["beta"] == 10.0
    pretrained.main(seeds=[0], out=out, steps=3)
    assert len(made) == len(METHODS)
    with pytest.raises(typer.BadParameter, match="other settings"):
        pretrained.main(seeds=[0], out=out, steps=4)
    shown = tables.pretrained(tmp_path)
    one = by_method["Dual averaging"]
    assert f"| Dual averaging | {one['cosine']:.3f}, {one['recall']:.3f} |" in shown and "3 steps of 16 texts" in shown
