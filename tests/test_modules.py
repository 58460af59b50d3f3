"""Every kind of module is masked, trained and given back: against a plain copy with its weights masked."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from spartan import GMP, Group, OneShot, RigL, Sparsifier, Spartan, StaticRandom

pytestmark = pytest.mark.usefixtures("one_thread")


class Conv1D(nn.Module):
    """Stands for that of Hugging Face's transformers: y = x w + b with w of shape [in, out]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y, shaped like x but for the last dimension."""
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


class Attention(nn.Module):
    """Self-attention, or with other keys and values, whose output alone is returned."""

    def __init__(self, kdim: int | None = None) -> None:
        super().__init__()
        self.kdim = kdim
        self.attention = nn.MultiheadAttention(8, 2, kdim=kdim, vdim=kdim, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention of x [n, length, 8]."""
        other = x if self.kdim is None else x[..., : self.kdim]
        return self.attention(x, other, other)[0]


class Recurrent(nn.Module):
    """A recurrent layer whose outputs alone are returned."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.layer = kind(6, 5, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs for x [n, length, 6]."""
        return self.layer(x)[0]


class Tied(nn.Module):
    """A table used to embed and to score, and two matrices that are one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.score = nn.Linear(6, 11)
        self.score.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Scores of tokens [n, length]."""
        return self.score(self.second(torch.relu(self.first(self.embedding(tokens)))))


class Own(nn.Module):
    """A class of the user's own with two parameters, one after the other in each order of masking."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(6, 10))
        self.shift = nn.Parameter(torch.zeros(10))
        self.down = nn.Parameter(torch.randn(10, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Two products."""
        return torch.relu(x @ self.up + self.shift) @ self.down


def floats(*shape: int) -> Callable[[], torch.Tensor]:
    """Inputs of a shape."""
    return lambda: torch.randn(shape)


def tokens(*shape: int) -> Callable[[], torch.Tensor]:
    """Indices of a shape, with repetitions."""
    return lambda: torch.randint(9, shape)


MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "linear": (lambda: nn.Linear(9, 7), floats(5, 9)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, stride=2), floats(2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, padding=1), floats(2, 6, 5, 7)),
    "conv3d": (lambda: nn.Conv3d(6, 8, (1, 2, 3)), floats(2, 6, 3, 4, 5)),
    "conv2d grouped": (lambda: nn.Conv2d(8, 12, 3, groups=2), floats(2, 8, 5, 7)),
    "conv2d by channel": (lambda: nn.Conv2d(8, 8, 3, groups=8), floats(2, 8, 5, 7)),
    "conv2d reflected": (lambda: nn.Conv2d(6, 8, 3, padding=2, padding_mode="reflect"), floats(2, 6, 5, 7)),
    "conv2d circular": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"), floats(2, 6, 5, 7)),
    "conv2d replicated": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="replicate"), floats(6, 5, 7)),
    "conv2d same": (lambda: nn.Conv2d(6, 8, 4, padding="same", dilation=2), floats(2, 6, 9, 9)),
    "conv1d circular": (lambda: nn.Conv1d(6, 8, 3, padding=1, padding_mode="circular"), floats(2, 6, 9)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(6, 8, 3), floats(2, 6, 9)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(6, 8, 3, stride=2, groups=2), floats(2, 6, 5, 7)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(6, 8, 2), floats(2, 6, 3, 3, 3)),
    "bilinear": (lambda: nn.Sequential(nn.Unflatten(1, (2, 5)), Pair()), floats(3, 10)),
    "embedding": (lambda: nn.Embedding(9, 10, padding_idx=2), tokens(4, 5)),
    "embedding bag": (lambda: nn.EmbeddingBag(9, 10, mode="sum"), tokens(4, 5)),
    "attention": (Attention, floats(3, 5, 8)),
    "attention to others": (lambda: Attention(6), floats(3, 5, 8)),
    "transformers": (lambda: nn.Sequential(Conv1D(12, 9), nn.GELU(), Conv1D(5, 12)), floats(3, 2, 9)),
    "lstm": (lambda: Recurrent(nn.LSTM), floats(3, 4, 6)),
    "gru": (lambda: Recurrent(nn.GRU), floats(3, 4, 6)),
    "tied": (Tied, tokens(3, 4)),
    "own": (Own, floats(4, 6)),
}


class Pair(nn.Module):
    """A bilinear form of both halves."""

    def __init__(self) -> None:
        super().__init__()
        self.form = nn.Bilinear(5, 5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The form of x [n, 2, 5]."""
        return self.form(x[:, 0], x[:, 1])


def expanded(mask: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """One entry per block, in the weight's shape."""
    return mask.repeat_interleave(block[0], 0)[: shape[0]].repeat_interleave(block[1], 1)[:, : shape[1]]


def stored_block(name: str, block: tuple[int, int]) -> tuple[int, int]:
    """Blocks (outputs, inputs) as the weight is stored."""
    return block[::-1] if name.startswith("transpose") or name == "transformers" else block


@pytest.mark.parametrize("block", [(1, 1), (2, 3)])
@pytest.mark.parametrize("name", MODULES)
def test_masked_module_computes_with_its_masked_weights(name: str, block: tuple[int, int]) -> None:
    """Value and gradients are those of a copy whose weights are zero where dropped."""
    torch.manual_seed(0)
    make, inputs = MODULES[name]
    model = make()
    plain = copy.deepcopy(model)
    parameters = list(model.parameters())
    method = StaticRandom(sparsity=0.5, block_size=block, distribution="uniform")
    sparsifier = Sparsifier(model, method, 10, include="*", count="masked")
    keep = {}
    for key, mask in sparsifier.masks().items():
        weight = plain.get_parameter(key)
        keep[key] = expanded(mask.hard, stored_block(name, block), weight.shape)
        assert 0 < int(keep[key].sum()) < weight.numel()
        with torch.no_grad():
            weight.mul_(keep[key])
    assert len(keep) == len({id(p) for n, p in plain.named_parameters() if p.dim() > 1 and "bias" not in n})
    x = inputs()
    y, expected = model(x), plain(x)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected.backward(upstream)
    for key, parameter in plain.named_parameters():
        if key in keep:
            parameter.grad.mul_(keep[key])
    sparsifier.finalize()
    assert {id(p) for p in model.parameters()} == {id(p) for p in parameters}
    for (key, got), (other, want) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert key == other
        torch.testing.assert_close(got.grad, want.grad)
        assert torch.equal(got, want)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("block", [(1, 1), (2, 3)])
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("method", [Spartan, RigL])
def test_every_module_trains_to_its_sparsity(name: str, block: tuple[int, int], method: Any) -> None:
    torch.manual_seed(0)
    make, inputs = MODULES[name]
    model = make()
    options = {"interval": 3} if method is RigL else {}
    sparsifier = Sparsifier(model, method(sparsity=0.5, block_size=block, **options), 20, include="*", count="masked")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sparsifier.attach(optimizer)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    sizes = {tensor.name: tensor.weight.numel() for tensor in sparsifier._masks.tensors}
    for _ in range(20):
        optimizer.zero_grad()
        model(inputs()).square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True) if pair[0].dim() > 1)
    kept = {key: round(part * sizes[key]) for key, part in sparsifier.kept_fractions().items()}
    sparsifier.finalize()
    weights = {key: model.get_parameter(key) for key in kept}
    total = sum(weight.numel() for weight in weights.values())
    zeros = {key: int((weight == 0).sum()) for key, weight in weights.items()}
    if method is RigL:  # what was grown and got no gradient since, of a row that was not looked up, is zero too
        assert all(zeros[key] >= weight.numel() - kept[key] for key, weight in weights.items())
        assert 0 <= total - sum(kept.values()) - round(0.5 * total) < block[0] * block[1]
    else:
        assert 0 <= sum(zeros.values()) - round(0.5 * total) < block[0] * block[1]


@pytest.mark.parametrize("block", [(1, 1), (2, 3)])
@pytest.mark.parametrize("name", MODULES)
def test_a_masked_model_has_the_names_of_the_plain_one(name: str, block: tuple[int, int]) -> None:
    """In its state, which trainers save, in the order of its parameters, and when a plain state is loaded."""
    torch.manual_seed(0)
    make, inputs = MODULES[name]
    model = make()
    plain = copy.deepcopy(model)
    Sparsifier(model, Spartan(sparsity=0.5, block_size=block), 10, include="*", count="masked")
    assert [key for key, _ in model.named_parameters()] == [key for key, _ in plain.named_parameters()]
    assert list(model.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(1.0)
    model.load_state_dict(plain.state_dict())
    for (key, value), other in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(value, other), key
    x = inputs()
    expected = torch.func.functional_call(model, {key: 0 * value for key, value in plain.named_parameters()}, (x,))
    assert not torch.equal(model(x), expected)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", ["attention", "transformers", "lstm", "tied", "transposed 1d", "own"])
def test_a_copy_of_a_masked_model_computes_alike_and_has_masks_of_its_own(name: str, way: str) -> None:
    torch.manual_seed(0)
    make, inputs = MODULES[name]
    model, x = make(), inputs()
    sparsifier = Sparsifier(model, StaticRandom(sparsity=0.5, block_size=(2, 3)), 10, include="*", count="masked")
    model(x)  # recurrent layers hold what they read
    expected = model(x).detach()
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    for mask in sparsifier.masks().values():
        mask.hard.zero_()
    assert torch.equal(other(x), expected)
    other(x).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert any(parameter.grad is not None for parameter in other.parameters())


def _send_output(model: nn.Module, x: torch.Tensor, queue: Any) -> None:
    queue.put(model(x).detach().numpy())


def test_a_model_with_masked_attention_goes_to_a_spawned_process() -> None:
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(3, 5, 8)
    Sparsifier(model, StaticRandom(sparsity=0.5), 10, include="*", count="masked")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_send_output, args=(model, x, queue))
    process.start()
    received = queue.get(timeout=120)
    process.join()
    torch.testing.assert_close(torch.from_numpy(received), model(x).detach())


def test_tied_weights_have_one_mask_for_both_uses() -> None:
    torch.manual_seed(0)
    model = Tied()
    method = Spartan(sparsity=0.5, preserve_scale=False)
    sparsifier = Sparsifier(model, method, 20, include=["first.*", "score.*"], count="masked")
    assert list(sparsifier.masks()) == ["embedding.weight", "first.weight"]
    for _ in range(10):
        sparsifier.step()
    soft, hard = sparsifier.masks()["first.weight"]
    assert 0 < int(hard.sum()) < hard.numel()
    for layer in (model.first, model.second):
        torch.testing.assert_close(layer.weight, dict(model.named_parameters())["first.weight"] * soft * hard)
    assert torch.equal(model.embedding.weight, model.score.weight)
    assert len(list(model.parameters())) == 4
    sparsifier.finalize()
    assert model.first.weight is model.second.weight and model.score.weight is model.embedding.weight
    assert {type(module) for module in model.children()} == {nn.Embedding, nn.Linear}


def test_blocks_of_weights_stored_by_inputs_are_of_outputs_and_inputs() -> None:
    modules = [Conv1D(12, 9), nn.ConvTranspose1d(9, 12, 3), nn.Linear(9, 12)]
    for module, grid in zip(modules, [(3, 3), (3, 3, 3), (3, 3)], strict=True):
        sparsifier = Sparsifier(nn.Sequential(module), OneShot(sparsity=0.5, block_size=(4, 3)), 2, include="0.*")
        assert sparsifier.masks()["0.weight"].hard.shape == grid
        # whole blocks of 4 outputs x 3 inputs are dropped
        sparsifier.finalize()
        zero = module.weight == 0
        dims = (0, 1) if isinstance(module, nn.Linear) else (1, 0)
        blocks = zero.unflatten(dims[0], (3, 4)).movedim(dims[0] + 1, 0)
        assert torch.equal(blocks.all(0), blocks.any(0)) and bool(zero.any())


def test_patterns_follow_the_inputs_of_weights_stored_by_inputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(6, 8), Conv1D(8, 6))
    with pytest.raises(ValueError, match=r"weight '1.weight' of shape \(6, 8\) does not divide .* its dimension 0"):
        Sparsifier(model, GMP(pattern=(2, 4)), 4)
    sparsifier = Sparsifier(model, GMP(pattern=(2, 4)), 4, exclude="1.*")
    sparsifier.finalize()
    assert bool(((model[0].weight != 0).view(2, 4, 6).sum(1) == 2).all())


def test_parameters_keep_their_order_whichever_is_masked_first() -> None:
    for first, second in (("up", "down"), ("down", "up")):
        model = Own()
        groups = [Group(include=first, sparsity=0.5), Group(include=second, sparsity=0.25)]
        Sparsifier(model, OneShot(sparsity=0.5), 2, include=(), groups=groups).finalize()
        assert [name for name, _ in model.named_parameters()] == ["up", "shift", "down"]


def test_attention_is_masked_in_its_inference_path_too() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    sparsifier = Sparsifier(nn.Sequential(layer), StaticRandom(sparsity=0.5), 10, include="*", count="masked")
    x = torch.randn(2, 5, 8)
    layer.eval()
    with torch.no_grad():
        inference = layer(x)
    torch.testing.assert_close(inference, layer(x))
    sparsifier.finalize()
    torch.testing.assert_close(layer(x), inference)
    assert int((layer.self_attn.in_proj_weight == 0).sum()) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(16, 24), lambda: nn.Conv2d(16, 24, 1), lambda: nn.Embedding(24, 16)]
)
def test_half_precision_weights_train_and_stay_so(make: Any, block: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = make().to(dtype)
    model = nn.Sequential(module)
    sparsifier = Sparsifier(model, Spartan(sparsity=0.75, block_size=block), 20, include="*.weight", count="masked")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sparsifier.attach(optimizer)
    x = {nn.Embedding: torch.arange(24), nn.Conv2d: torch.randn(2, 16, 5, 5).to(dtype)}
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(x.get(type(make()), torch.randn(32, 16).to(dtype))).float().sub(0.5).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    sparsifier.finalize()
    assert module.weight.dtype == dtype
    assert int((module.weight == 0).sum()) == 288
    assert losses[-1] < losses[0]


def test_compiled_attention_trains_as_the_eager_one() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(Attention(), nn.Linear(8, 8), nn.Linear(8, 3))
    eager = copy.deepcopy(model)
    runs = []
    for network, call in ((model, torch.compile(model, backend="aot_eager")), (eager, eager)):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
        sparsifier = Sparsifier(network, Spartan(sparsity=0.6), 10)
        sparsifier.attach(optimizer)
        assert "0.attention.in_proj_weight" in sparsifier.masks()
        generator = torch.Generator().manual_seed(1)
        losses = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = functional.cross_entropy(call(torch.randn(3, 5, 8, generator=generator)).mean(1), torch.arange(3))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs.append(losses)
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)
