"""Which weights are masked, by default, by pattern, type and function, in groups, and what is said of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from spartan import Group, OneShot, RigL, Sparsifier, Spartan, StaticRandom, TopKAST

pytestmark = pytest.mark.usefixtures("one_thread")


class Scale(nn.Module):
    """A class of the user's own, with a matrix and a table of biases."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(9, 9))
        self.relative_bias_table = nn.Parameter(torch.randn(9, 9))


class Mixed(nn.Module):
    """Every kind of module that selection must tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(6, 8, 3)
        self.norm = nn.LayerNorm([2, 8])
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.tied_in = nn.Linear(8, 9)
        self.tied_out = nn.Linear(8, 9)
        self.tied_out.weight = self.tied_in.weight
        self.scale = Scale()
        self.unused = nn.Embedding(7, 6, sparse=True)
        self.head = nn.Linear(9, 7)


DEFAULT = [
    "conv.weight",
    "encoder.self_attn.in_proj_weight",
    "encoder.self_attn.out_proj.weight",
    "encoder.linear1.weight",
    "encoder.linear2.weight",
    "tied_in.weight",
]


def masked_names(**arguments: Any) -> list[str]:
    return list(Sparsifier(Mixed(), OneShot(sparsity=0.01), 10, **arguments).masks())


def test_default_skips_embeddings_norms_biases_and_the_head_and_says_why() -> None:
    sparsifier = Sparsifier(Mixed(), OneShot(sparsity=0.03), 10)
    assert list(sparsifier.masks()) == DEFAULT
    skipped = sparsifier.skipped
    assert {name: skipped[name] for name in skipped if "bias" not in name and "encoder" not in name} == {
        "embedding.weight": "embedding",
        "norm.weight": "norm",
        "scale.kernel": "Scale is dense by default",
        "unused.weight": "embedding with sparse gradients",
        "head.weight": "head: the last Linear",
    }
    assert {reason for name, reason in skipped.items() if "bias" in name} == {"bias"}
    assert skipped["encoder.norm1.weight"] == "norm"
    names = [name for name, _ in Mixed().named_parameters()]
    assert sorted([*skipped, *DEFAULT]) == sorted(names)


def test_include_and_exclude_by_pattern_type_and_function() -> None:
    assert masked_names(include=["embedding.weight", "head.*"]) == ["embedding.weight", "head.weight"]
    assert masked_names(exclude="encoder.*") == ["conv.weight", "tied_in.weight"]
    assert masked_names(include=lambda name, module: isinstance(module, nn.Conv1d)) == ["conv.weight"]
    assert masked_names(include=nn.MultiheadAttention) == DEFAULT[1:3]
    assert masked_names(exclude=[nn.TransformerEncoderLayer, "conv.*"]) == ["tied_in.weight"]
    assert masked_names(include=[Scale, nn.Conv1d]) == ["conv.weight", "scale.kernel"]
    assert masked_names(include="tied_out.weight") == ["tied_in.weight"]
    assert masked_names(include="*", exclude=lambda name, module: name != "norm.weight") == ["norm.weight"]


def test_a_choice_that_matches_nothing_is_refused_with_the_reason() -> None:
    with pytest.raises(
        ValueError, match=r"include pattern 'bert.*' matches no weight that can be masked; the model has"
    ):
        masked_names(include="bert.*")
    with pytest.raises(ValueError, match=r"only \{'unused.weight': 'embedding with sparse gradients'\}"):
        masked_names(include="unused.*")
    with pytest.raises(ValueError, match="exclude type Conv2d matches no weight"):
        masked_names(exclude=nn.Conv2d)
    for wrong in ([3], 3, {"conv.weight": 1}.items()):
        with pytest.raises(TypeError, match="include and exclude take"):
            masked_names(include=wrong)
    with pytest.raises(ValueError, match=r"no weight to sparsify; .* 'head: the last Linear'"):
        Sparsifier(nn.Sequential(nn.Linear(3, 4)), Spartan(sparsity=0.5), 10)


def test_reasons_of_what_a_choice_leaves_out() -> None:
    skipped = Sparsifier(Mixed(), OneShot(sparsity=0.02), 10, exclude="conv.*").skipped
    assert skipped["conv.weight"] == "excluded"
    skipped = Sparsifier(Mixed(), OneShot(sparsity=0.02), 10, include="tied_*").skipped
    assert (skipped["conv.weight"], skipped["embedding.weight"]) == ("not included", "embedding")


def test_what_cannot_be_masked_says_so() -> None:
    layers = weight_norm(nn.Linear(4, 4)), nn.Embedding(4, 4, max_norm=1.0), nn.Linear(4, 4), nn.Linear(4, 4)
    model = nn.Sequential(*layers)
    skipped = Sparsifier(model, OneShot(sparsity=0.1), 10, count="masked").skipped
    assert skipped["0.parametrizations.weight.original1"] == "parametrized already"
    assert skipped["1.weight"] == "embedding that renormalises its rows"
    with pytest.raises(ValueError, match="model has a masked module already: '2'"):
        Sparsifier(model, OneShot(sparsity=0.1), 10, count="masked")
    with pytest.raises(ValueError, match=r"parameter '0.weight' is not initialised yet"):
        Sparsifier(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4)), OneShot(sparsity=0.1), 10)


def test_an_embedding_tied_to_the_head_is_dense_by_default() -> None:
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7))
    model[2].weight = model[0].weight
    sparsifier = Sparsifier(model, OneShot(sparsity=0.1), 10)
    assert list(sparsifier.masks()) == ["1.weight"]
    assert sparsifier.skipped["0.weight"] == "embedding, head: the last Linear"


# ------------------------------------------------------------------------------------------------------ groups


def network() -> nn.Sequential:
    """20 * 30 embedded, 30 * 40 and 40 * 50 hidden, 50 * 3 at the head; 4093 parameters with biases."""
    return nn.Sequential(nn.Embedding(20, 30), nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 50), nn.Linear(50, 3))


def final_zeros(model: nn.Sequential, method: Any, **arguments: Any) -> list[int]:
    """Zeros of each weight after a training without steps."""
    sparsifier = Sparsifier(model, method, 10, **arguments)
    sparsifier.finalize()
    return [int((model[i].weight == 0).sum()) for i in (0, 1, 3, 4)]


def test_groups_have_their_own_sparsity_blocks_and_distribution() -> None:
    torch.manual_seed(0)
    model = network()
    groups = [
        Group(include="3.*", sparsity=0.75, block_size=(10, 20)),
        Group(include=nn.Embedding, sparsity=0.5, block_size=1),
    ]
    sparsifier = Sparsifier(model, Spartan(sparsity=0.9, block_size=5), 10, groups=groups, count="masked")
    assert {name: tuple(mask.hard.shape) for name, mask in sparsifier.masks().items()} == {
        "1.weight": (8, 6),
        "3.weight": (5, 2),
        "0.weight": (20, 30),
    }
    assert (sparsifier.skipped["4.weight"], "0.weight" in sparsifier.skipped) == ("head: the last Linear", False)
    sparsifier.finalize()
    zeros = [int((model[i].weight == 0).sum()) for i in (0, 1, 3, 4)]
    assert zeros == [300, 1100, 1600, 0]  # exact to one block, each part for itself
    assert sparsifier.sparsity == 3000 / 3800


def test_the_rest_of_the_model_counts_without_groups_of_their_own_sparsity() -> None:
    torch.manual_seed(0)
    zeros = final_zeros(network(), OneShot(sparsity=0.5), groups=[Group(include=nn.Embedding, sparsity=0.25)])
    assert zeros[0] == 150
    assert sum(zeros[1:]) == round(0.5 * (4043 - 600))


def test_a_group_without_a_sparsity_shares_the_methods() -> None:
    torch.manual_seed(0)
    for distribution in ("global", "uniform", "erk"):
        groups = [Group(include="3.*", block_size=5, distribution=distribution)]
        zeros = final_zeros(network(), OneShot(sparsity=0.6), groups=groups)
        total = round(0.6 * 4043)
        assert sum(zeros) - total in range(25)
        assert zeros[1] / 1200 == pytest.approx(zeros[2] / 2000, abs=0.02)


def test_a_distribution_of_a_group_holds_within_it() -> None:
    for distribution, expected in (("uniform", [0, 600, 1000, 0]), (None, [0, 0, 1600, 0])):
        torch.manual_seed(0)
        model = network()
        with torch.no_grad():
            model[1].weight.copy_(torch.rand(40, 30) + 1)
        groups = [Group(include=nn.Linear, exclude="4.*", sparsity=0.5, distribution=distribution)]
        assert final_zeros(model, OneShot(sparsity=0.5), include=(), groups=groups) == expected


def test_the_first_group_has_a_weight_and_exclude_takes_it_from_all() -> None:
    groups = [Group(include="1.*", sparsity=0.5), Group(include=["1.*", "3.*", "4.*"], sparsity=0.75)]
    zeros = final_zeros(network(), StaticRandom(sparsity=0.1, distribution="global"), groups=groups, exclude="4.*")
    assert zeros == [0, 600, 1500, 0]


@pytest.mark.parametrize(
    "method",
    [RigL(sparsity=0.8, interval=2), TopKAST(sparsity=0.8, backward_sparsity=0.4, interval=2), Spartan(sparsity=0.8)],
)
def test_methods_train_groups_to_their_sparsity_and_resume(method: Any) -> None:
    torch.manual_seed(0)
    groups = [Group(include="3.*", sparsity=0.5, block_size=5), Group(include=nn.Embedding, sparsity=0.25)]
    state: dict[str, Any] = {}
    ends = []
    for resumed in (False, True):
        torch.manual_seed(0)
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        sparsifier = Sparsifier(model, method, 20, count="masked", groups=groups)
        if resumed:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            sparsifier.load_state_dict(state["sparsifier"])
        sparsifier.attach(optimizer)
        for step in range(10 if resumed else 0, 20):
            optimizer.zero_grad()
            tokens = torch.arange(20)
            nn.functional.cross_entropy(model(tokens), tokens % 3).backward()
            optimizer.step()
            if step == 9 and not resumed:
                parts = {"model": model, "optimizer": optimizer, "sparsifier": sparsifier}
                saved = {name: part.state_dict() for name, part in parts.items()}
                state = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, saved)
        sparsifier.finalize()
        zeros = [int((model[i].weight == 0).sum()) for i in (0, 1, 3, 4)]
        assert zeros[0] >= 150 and zeros[1] >= 960 and zeros[2] >= 1000 and zeros[3] == 0
        if not isinstance(method, RigL):
            assert zeros == [150, 960, 1000, 0]
        ends.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Group(include="*", sparsity=1.0), ValueError, r"sparsity must be in \[0, 1\); got 1.0"),
        (lambda: Group(include="*", sparsity="a"), TypeError, "sparsity must be a number"),
        (lambda: Group(include="*", block_size=0), ValueError, "block"),
        (lambda: Group(include="*", distribution="any"), ValueError, "distribution must be one of"),
        (lambda: ["1.*"], TypeError, "groups must be a sequence of spartan.Group"),
        (lambda: Group(include="9.*"), ValueError, "include pattern '9.\\*' matches no weight"),
        (lambda: Group(include=lambda name, module: False), ValueError, r"groups\[0\] has no weight"),
        (lambda: Group(include="3.*", sparsity=0.9999), ValueError, "sparsity 0.9999 cannot be reached"),
        (lambda: Group(include="*", pattern=(4, 2)), ValueError, r"pattern must be a pair \(n, m\)"),
        (
            lambda: Group(include="*", pattern=(2, 4), block_size=4),
            ValueError,
            r"block_size must be left out with pattern \(2, 4\); got 4",
        ),
        (lambda: Group(include="3.*", pattern=(5, 7)), ValueError, "weight '3.weight' of .* does not divide into .* 7"),
    ],
)
def test_bad_groups_are_refused_by_name(make: Any, error: type[Exception], message: str) -> None:
    model = network()
    with pytest.raises(error, match=message):
        made = make()
        Sparsifier(model, OneShot(sparsity=0.5), 10, groups=made if isinstance(made, list) else [made])
    assert type(model[1]) is nn.Linear


def test_budgets_may_differ_in_dtype_but_not_within() -> None:
    def mixed() -> nn.Sequential:
        torch.manual_seed(0)
        model = network()
        model[3].to(torch.bfloat16)
        return model

    with pytest.raises(ValueError, match=r"that share a budget must share a dtype and a device; got .*bfloat16"):
        Sparsifier(mixed(), Spartan(sparsity=0.5), 10)
    for method in (
        Spartan(sparsity=0.5, distribution="uniform"),
        RigL(sparsity=0.5, distribution="uniform", interval=1),
    ):
        assert final_zeros(mixed(), method, count="masked") == [0, 600, 1000, 0]
    zeros = final_zeros(mixed(), OneShot(sparsity=0.5), count="masked", groups=[Group(include="3.*", sparsity=0.75)])
    assert zeros == [0, 600, 1500, 0]
