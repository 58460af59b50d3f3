"""Sparse encoders: against loops over texts and terms in float64, their penalty, their export."""

from __future__ import annotations

import copy
import json
import math
import runpy
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from test_layers_hierarchical_memory import write_wordnet
from torch import Tensor, nn

import spartan
from spartan.layers import SparseEncoder, flops_loss, to_csr
from spartan_kernels.testing import oracle_soft_topk

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "layers"
pytestmark = pytest.mark.usefixtures("one_thread")


class Given(nn.Module):
    """Gives what it gets."""

    def forward(self, logits: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return logits


class Embedded(nn.Module):
    """A small encoder of token numbers."""

    def __init__(self, vocabulary: int = 11, width: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.embedding(tokens)


def by_loops(logits: Tensor, mask: Tensor | None, terms: int | None = None) -> Tensor:
    """The equation, text by text and term by term."""
    rows = []
    for i, text in enumerate(logits):
        row = []
        for j in range(logits.shape[2]):
            weights = [text[t, j].clamp(min=0).log1p() for t in range(len(text)) if mask is None or mask[i, t]]
            row.append(max(weights, default=logits.new_zeros(()), key=lambda w: w.item()))
        dropped = sorted(range(len(row)), key=lambda j: -row[j].item())[terms:] if terms else []
        rows.append(torch.stack([w * 0 if j in dropped else w for j, w in enumerate(row)]))
    return torch.stack(rows)


@pytest.mark.parametrize("terms", [None, 1, 3, 9])
@pytest.mark.parametrize("masked", [True, False])
def test_equals_loops_with_gradients(terms: int | None, masked: bool) -> None:
    torch.manual_seed(terms or 0)
    logits = torch.randn(4, 5, 9, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(4, 5) < 0.6 if masked else None
    if mask is not None:
        mask[2] = False  # a text without tokens
    weights = SparseEncoder(Given(), terms=terms)(logits, attention_mask=mask)
    expected = by_loops(logits, mask, terms)
    torch.testing.assert_close(weights, expected, rtol=1e-13, atol=0)
    assert mask is None or not weights[2].any()
    assert terms is None or int((weights != 0).sum(1).max()) <= terms
    upstream = torch.randn_like(expected)
    mine, theirs = (torch.autograd.grad(w, logits, upstream)[0] for w in (weights, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=0)


def test_the_choice_passes_a_gradient_at_beta() -> None:
    """w h with h hard has dL/dw = g h + (the gradient of the soft mask under g w)."""
    torch.manual_seed(0)
    weights = torch.rand(3, 7, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 7, dtype=torch.float64)
    kept = SparseEncoder(Given(), terms=2, beta=3.0).keep(weights)
    assert torch.equal(kept, SparseEncoder(Given(), terms=2).keep(weights))
    (mine,) = torch.autograd.grad(kept, weights, upstream)
    soft = oracle_soft_topk(weights, 2, None, 3.0)
    (through,) = torch.autograd.grad(soft, weights, upstream * weights.detach())
    torch.testing.assert_close(mine, upstream * (kept.detach() != 0) + through, rtol=1e-5, atol=1e-6)
    assert bool((mine[kept == 0] != 0).all())


def test_states_are_found_in_what_encoders_give() -> None:
    logits = torch.randn(2, 3, 4)
    expected = SparseEncoder(Given())(logits)
    named = namedtuple("named", ["logits", "other"])
    states = namedtuple("states", ["last_hidden_state"])
    for found in ((logits, 1), named(logits, 1), states(logits)):
        encoder = Given()
        encoder.forward = lambda tokens, found=found: found  # type: ignore[method-assign, misc, assignment]
        assert torch.equal(SparseEncoder(encoder)(logits), expected)


def test_a_head_makes_the_logits_and_the_mask_reaches_the_encoder() -> None:
    class Masked(Embedded):
        def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            assert attention_mask is not None
            return super().forward(tokens) * attention_mask[..., None]

    encoder, head, tokens = Masked(), nn.Linear(6, 11), torch.randint(11, (3, 4))
    mask = torch.tensor([[1, 1, 1, 0]] * 3)
    expected = head(encoder.embedding(tokens[:, :3])).relu().log1p().amax(1)
    torch.testing.assert_close(SparseEncoder(encoder, head)(tokens, mask), expected)


def test_a_masked_language_model_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="the extra `integrations`")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=30, **sizes)).eval()
    tokens, mask = torch.randint(30, (2, 7)), torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    weights = SparseEncoder(model, terms=5)(tokens, mask)
    assert weights.shape == (2, 30) and bool(((weights > 0).sum(1) <= 5).all())
    shorter = SparseEncoder(model, terms=5)(tokens[1:, :4], mask[1:, :4])
    torch.testing.assert_close(weights[1:], shorter, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"terms": 3}, {"terms": 3, "beta": 2.0}])
def test_composes(settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    make = lambda: SparseEncoder(Embedded(), nn.Linear(6, 11), **settings)  # noqa: E731
    model, tokens, mask = make(), torch.randint(11, (3, 4)), torch.tensor([[1, 1, 0, 1]] * 3)
    weights = model(tokens, mask)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, mask), weights)
    assert torch.equal(copy.deepcopy(model)(tokens, mask), weights)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(tokens, mask)
        flops_loss(low).backward()
    torch.testing.assert_close(low.float(), weights, rtol=0.05, atol=0.05)
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad()
    spartan.save_pretrained(model, tmp_path / "saved")
    assert torch.equal(spartan.load_pretrained(make(), tmp_path / "saved")(tokens, mask), weights)


@pytest.mark.parametrize("weighted", [True, False])
def test_the_penalty_and_its_gradient(weighted: bool) -> None:
    torch.manual_seed(0)
    weights = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    idf = torch.rand(7, dtype=torch.float64) + 0.1 if weighted else None
    loss = flops_loss(weights, idf)
    values = weights.detach().tolist()
    scales = idf.tolist() if idf is not None else [1.0] * 7
    means = [sum(abs(row[j]) for row in values) / 5 for j in range(7)]
    assert loss.item() == pytest.approx(sum((mean / scale) ** 2 for mean, scale in zip(means, scales, strict=True)))
    (gradient,) = torch.autograd.grad(loss, weights)
    for i in range(5):
        for j in range(7):
            expected = 2 * means[j] / scales[j] ** 2 / 5 * math.copysign(1, values[i][j])
            assert gradient[i, j].item() == pytest.approx(expected)


def test_the_penalty_prefers_terms_that_few_texts_have() -> None:
    same, different = torch.zeros(4, 6), torch.zeros(4, 6)
    same[:, 0] = 1
    different[torch.arange(4), torch.arange(4)] = 1
    assert flops_loss(same) == 4 * flops_loss(different)
    assert flops_loss(different.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_inverted_index_gives_the_scores(dtype: torch.dtype) -> None:
    pytest.importorskip("scipy")
    torch.manual_seed(0)
    keep = SparseEncoder(Given(), terms=4).keep
    queries, documents = (keep(torch.rand(n, 20)).to(dtype).requires_grad_() for n in (3, 6))
    rows, index = to_csr(queries), to_csr(documents).T.tocsr()
    assert rows.nnz == 12 and index.nnz == 24 and index.shape == (20, 6)
    scores = torch.as_tensor((rows @ index).toarray())
    torch.testing.assert_close(scores.double(), queries.double() @ documents.double().T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"terms": 0}, "terms must be at least 1 or None; got 0"),
        ({"beta": 1.0}, "beta must be .* needs terms; got 1.0 and terms=None"),
        ({"terms": 2, "beta": -1.0}, "beta must be at least 0 and finite, .* got -1.0 and terms=2"),
        ({"terms": 2, "beta": math.inf}, "beta must be at least 0 and finite, .* got inf"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseEncoder(Given(), **settings)


def test_wrong_inputs_are_refused() -> None:
    model = SparseEncoder(Given(), terms=5)
    with pytest.raises(ValueError, match=r"logits must be \[batch, tokens, vocabulary\]; got \(2, 3\)"):
        model(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"attention_mask must be \(2, 3\), as the tokens are; got \(2, 4\)"):
        model(torch.zeros(2, 3, 9), torch.ones(2, 4))
    with pytest.raises(ValueError, match="terms must be at most the 4 of the vocabulary; got 5"):
        model(torch.zeros(2, 3, 4))
    with pytest.raises(TypeError, match=r"encoder must give a tensor, .* got list"):
        model([1, 2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weights must be \[batch, vocabulary\]; got \(3,\)"):
        flops_loss(torch.zeros(3))
    with pytest.raises(ValueError, match=r"idf must be \[3\], one for each term; got \(2,\)"):
        flops_loss(torch.zeros(2, 3), torch.ones(2))
    pytest.importorskip("scipy")
    with pytest.raises(ValueError, match=r"weights must be \[texts, vocabulary\]; got \(3,\)"):
        to_csr(torch.zeros(3))


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("scipy", "matplotlib", "rich"):
        pytest.importorskip(package)
    write_wordnet(tmp_path / "wordnet")
    monkeypatch.syspath_prepend(EXAMPLES)
    script = EXAMPLES / "sparse_encoder.py"
    sizes = ["--train", "40", "--test", "15"]
    arguments = ["--quick", *sizes, "--data", str(tmp_path / "wordnet"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    runpy.run_path(str(script), run_name="__main__")
    results = json.loads((tmp_path / "out" / "sparse_encoder.json").read_text())["results"]
    assert {row["method"] for row in results} == {
        "BM25, whole words",
        "BM25, the same terms",
        "dense vector",
        "FLOPS",
        "IDF-FLOPS",
        "exact top-k",
    }
    kept = {row["setting"]: row["terms"] for row in results if row["method"] == "exact top-k"}
    assert all(terms <= most for most, terms in kept.items())


def test_bm25_and_recall_of_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy")
    monkeypatch.syspath_prepend(EXAMPLES)
    import numpy as np
    import sparse_encoder

    documents = [["a", *["x"] * 20], *[["a"]] * 10, ["b"]]  # short ones come first: of them the others of a tie
    found = sparse_encoder.bm25([["a"]] * 11 + [["b"]], documents)
    assert found["recall"] == pytest.approx(100 * 11 / 12)
    assert found["read"] == pytest.approx((11 * 11 + 1) / 12) and found["asked"] == 1
    assert found["terms"] == pytest.approx(13 / 12)
    assert sparse_encoder.recall(np.array([[2.0, 1], [3, 3]]), 1) == 50.0  # a tie does not count as found
