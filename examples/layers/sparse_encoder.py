"""Definitions of WordNet find their synset: sparse encoders under three ways to keep few terms, BM25, dense vectors.

Needs `apt-get install wordnet-base` and `pip install scipy`. A query is the definition of a noun. Its document has the
words of the noun, the words of its hypernym and the hypernym's definition. Those of the test are not trained on.
"""

from __future__ import annotations

import copy
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import wordnet
from study import Record, Study, means, options
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, linear, normalize
from torch.nn.utils.rnn import pad_sequence

from spartan.layers import SparseEncoder, flops_loss, to_csr

WORDS, PIECES = 3000, 2000  # of the vocabulary; rarer words are a first and a last piece
WIDTH, BATCH, RATE = 64, 64, 2e-3
PENALTIES = (0.1, 1.0, 10.0)
TERMS = (48, 24, 12)
START = 1e-3  # penalty of the steps that all share
Texts = list[list[str]]


def pairs(folder: Path, count: int) -> tuple[Texts, Texts]:
    """Words of queries and of documents, in a random order that is always the same."""
    synsets = wordnet.read(folder)
    by_key = {synset.key: synset for synset in synsets}
    nouns = [synset for synset in synsets if synset.key[0] == "n" and synset.above]
    random.Random(0).shuffle(nouns)
    queries, documents = [], []
    for synset in nouns[:count]:
        above = by_key[synset.above[0]]
        queries.append(re.findall("[a-z]+", synset.definition.lower()))
        documents.append(re.findall("[a-z]+", " ".join([*synset.words, *above.words, above.definition]).lower()))
    return queries, documents


class Vocabulary:
    """Frequent words as they are, the others by how they begin and end; made of the texts to train on."""

    def __init__(self, texts: Texts) -> None:
        counts = Counter(word for text in texts for word in text)
        self.words = dict.fromkeys(word for word, _ in counts.most_common(WORDS))
        pieces: Counter[str] = Counter()
        for word, count in counts.items():
            if word not in self.words:
                pieces.update(dict.fromkeys(self._pieces(word), count))
        terms = [*self.words, *(piece for piece, _ in pieces.most_common(PIECES))]
        self.numbers = {term: number for number, term in enumerate(terms, 1)}  # 0 is padding

    def __len__(self) -> int:
        return 1 + len(self.numbers)

    @staticmethod
    def _pieces(word: str) -> tuple[str, str]:
        return word[:5] + "-", "-" + word[-4:]

    def encode(self, texts: Texts, most: int) -> Tensor:
        """Numbers of terms `[n, tokens]`, the first `most` of each text."""
        rows = []
        for text in texts:
            numbers = [self.numbers[part] for part in self.parts(text)]
            rows.append(torch.tensor(numbers[:most], dtype=torch.int64))
        return pad_sequence(rows, batch_first=True)

    def parts(self, text: list[str]) -> list[str]:
        """The terms of a text."""
        parts = [part for word in text for part in ([word] if word in self.words else self._pieces(word))]
        return [part for part in parts if part in self.numbers]


class Bag(nn.Module):
    """States of terms, each on its own."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        nn.init.normal_(self.embedding.weight, std=WIDTH**-0.5)
        self.inner, self.outer = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        nn.init.zeros_(self.outer.weight)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """`[batch, tokens]` to `[batch, tokens, width]`."""
        states = self.embedding(tokens)
        return states + self.outer(gelu(self.inner(states)))


class Logits(nn.Module):
    """Products of states with the embeddings of all terms; at the start a term finds itself, a rare one with more."""

    def __init__(self, embedding: nn.Embedding, idf: Tensor) -> None:
        super().__init__()
        self.embedding = embedding
        self.bias = nn.Parameter(2 * idf / idf.max() - 4)

    def forward(self, states: Tensor) -> Tensor:
        """`[..., width]` to `[..., vocabulary]`."""
        return linear(5 * states, self.embedding.weight, self.bias)


class Dense(nn.Module):
    """A vector of length 1 for each text: the mean of its states."""

    def __init__(self, bag: Bag) -> None:
        super().__init__()
        self.encoder = bag

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """`[batch, tokens]` to `[batch, width]`."""
        there = attention_mask[..., None]
        return normalize((self.encoder(tokens) * there).sum(1) / there.sum(1).clamp(min=1), dim=-1)


class Retrieval:
    """Queries and documents to train on and to test."""

    def __init__(self, folder: Path, train: int, test: int) -> None:
        queries, documents = pairs(folder, train + test)
        self.vocabulary = Vocabulary([*queries[:train], *documents[:train]])
        self.queries = self.vocabulary.encode(queries, 14)
        self.documents = self.vocabulary.encode(documents, 20)
        self.train, self.words = train, (queries[train:], documents[train:])
        self.parts = tuple([self.vocabulary.parts(text) for text in texts] for texts in self.words)
        seen = torch.zeros(train, len(self.vocabulary)).scatter(1, self.documents[:train], 1.0).sum(0)
        idf = torch.log(1 + train / (1 + seen))
        self.idf = idf / (idf**-2).mean() ** -0.5  # a penalty of the same size on average

    def fit(self, model: nn.Module, seed: int, steps: int, penalty: float | None, weighted: bool = False) -> None:
        """Train to tell the document of each query from the others of the batch."""
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
        sharpness = 20.0 if isinstance(model, Dense) else 1.0
        for step in range(steps):
            chosen = torch.randint(self.train, (BATCH,), generator=generator)
            q, d = (model(texts, attention_mask=texts > 0) for texts in (self.queries[chosen], self.documents[chosen]))
            loss = cross_entropy(sharpness * q @ d.T, torch.arange(BATCH))
            if penalty is not None:
                idf = self.idf if weighted else None
                ramp = min(1.0, 2 * (step + 1) / steps) ** 2
                loss = loss + ramp * penalty * (flops_loss(q, idf) + flops_loss(d, idf))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    @torch.no_grad()
    def encoded(self, model: nn.Module) -> list[Tensor]:
        """Queries and documents of the test."""
        held_out = (self.queries[self.train :], self.documents[self.train :])
        return [torch.cat([model(part, attention_mask=part > 0) for part in texts.split(100)]) for texts in held_out]

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Recall, terms of a text, and entries of the inverted index that a query reads."""
        queries, documents = self.encoded(model)
        if isinstance(model, Dense):
            return {"recall": recall((queries @ documents.T).numpy()), "terms": WIDTH, "asked": WIDTH}
        rows, index = to_csr(queries), to_csr(documents).T.tocsr()  # of the index a row is a term
        read = (rows != 0).astype(np.int64) @ np.diff(index.indptr)
        terms = {"terms": index.nnz / len(documents), "asked": rows.nnz / len(queries)}
        return {"recall": recall((rows @ index).toarray()), **terms, "read": float(read.mean())}


def bm25(queries: Texts, documents: Texts, k1: float = 1.2, b: float = 0.75) -> dict[str, float]:
    """What `Retrieval.measure` gives, for BM25 (Robertson and Zaragoza, 2009)."""
    n, counts = len(documents), [Counter(document) for document in documents]
    lengths = np.array([len(document) for document in documents])
    holders: dict[str, list[int]] = {}
    for i, count in enumerate(counts):
        for word in count:
            holders.setdefault(word, []).append(i)
    scores, read, asked = np.zeros((len(queries), n)), 0, 0
    for row, query in zip(scores, queries, strict=True):
        for word in holders.keys() & set(query):
            those = holders[word]
            often = np.array([counts[i][word] for i in those])
            idf = np.log(1 + (n - len(those) + 0.5) / (len(those) + 0.5))
            row[those] += idf * often * (k1 + 1) / (often + k1 * (1 - b + b * lengths[those] / lengths.mean()))
            read += len(those)
        asked += len(set(query))
    terms = {"terms": sum(map(len, counts)) / n, "asked": asked / len(queries)}
    return {"recall": recall(scores), **terms, "read": read / len(queries)}


def recall(scores: np.ndarray, first: int = 10) -> float:
    """Percent of the queries whose document is among the `first`; of equal scores the others come before it."""
    above = (scores >= np.diag(scores)[:, None]).sum(1) - 1
    return 100 * float((above < first).mean())


def draw(axes: Any, records: Sequence[Record]) -> None:
    """Recall against the terms of a document."""
    for number, method in enumerate(dict.fromkeys(r["method"] for r in records)):
        settings = dict.fromkeys(r["setting"] for r in records if r["method"] == method)
        points = [
            [means(records, key, method=method, setting=setting) for setting in settings] for key in ("terms", "recall")
        ]
        axes.plot(*points, marker="os^Dvx"[number % 6], linestyle="-" if len(settings) > 1 else "", label=method)
    axes.set(xscale="log", xlabel="terms of a document", ylabel="recall@10, %")
    axes.legend()


def main() -> None:
    """Train a start for each seed, and from it each setting."""
    arguments = options(
        __doc__,
        data={"type": Path, "default": wordnet.FOLDER, "help": "folder of WordNet's data.noun, ..."},
        train={"type": int, "default": 20000, "help": "pairs to train on"},
        test={"type": int, "default": 2000, "help": "pairs to test with"},
        steps={"type": int, "default": 180, "help": "that all share; each setting then takes a sixth of them more"},
    )
    torch.set_num_threads(1)
    if arguments.quick:
        arguments.train, arguments.test, arguments.steps = min(arguments.train, 1000), min(arguments.test, 100), 6
    task = Retrieval(arguments.data, arguments.train, arguments.test)
    more = max(1, arguments.steps // 6)
    study = Study(
        "sparse_encoder",
        by={"method": "method", "setting": "penalty or terms"},
        measures={
            "recall": ("recall@10 %", "{:.1f}"),
            "terms": ("terms of a document", "{:.1f}"),
            "asked": ("terms of a query", "{:.1f}"),
            "read": ("index entries read", "{:,.0f}"),
        },
        about=f"{arguments.train} definitions of WordNet's nouns to train, {arguments.test} others to test against"
        f" their {arguments.test} documents. {len(task.vocabulary)} terms, width {WIDTH}; {arguments.steps} steps of"
        f" {BATCH} pairs that all settings share, {more} for each. Index entries read: for a query, on average.",
    )
    for seed in arguments.seeds:
        if seed == arguments.seeds[0]:
            study.add(seed, method="BM25, whole words", setting=None, **bm25(*task.words))
            study.add(seed, method="BM25, the same terms", setting=None, **bm25(*task.parts))
        torch.manual_seed(seed)
        bag = Bag(len(task.vocabulary))
        dense = Dense(copy.deepcopy(bag))
        task.fit(dense, seed, arguments.steps + more, None)
        study.add(seed, method="dense vector", setting=None, **task.measure(dense))
        start = SparseEncoder(bag, Logits(bag.embedding, task.idf))
        task.fit(start, seed, arguments.steps, START)
        for method, settings in (("FLOPS", PENALTIES), ("IDF-FLOPS", PENALTIES), ("exact top-k", TERMS)):
            for setting in settings:
                model = copy.deepcopy(start)
                if method == "exact top-k":
                    model.terms = int(setting)
                task.fit(model, seed + 100, more, None if model.terms else setting, method == "IDF-FLOPS")
                study.add(seed, method=method, setting=setting, **task.measure(model))
    study.finish(arguments.out, draw)


if __name__ == "__main__":
    main()
