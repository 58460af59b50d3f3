"""2:4 weights become PyTorch's own sparse tensors where it takes them; every other case has its reason."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import spartan
from spartan.saving import semi_structured

REFUSED = r"model has no 2:4 weight that PyTorch multiplies: "


def two_of_four(*shape: int, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    """A layer whose weight of this shape, [out, in], keeps the two largest of each four."""
    layer = nn.Linear(shape[1], shape[0])
    with torch.no_grad():
        layer.weight.mul_(spartan.sparsity_pattern(layer.weight.detach().abs(), 2, 4))
    return layer.to(dtype)


class Cuda(torch.Tensor):
    """A tensor that says it is on a GPU with the tensor cores."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where it would be."""
        return torch.device("cuda", 0)


@pytest.fixture
def accepting(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Weights as PyTorch's conversion gets them; it is replaced by one that takes bfloat16 in multiples of 32 rows."""
    seen: list[torch.Tensor] = []

    def convert(weight: torch.Tensor) -> torch.Tensor:
        if weight.dtype != torch.bfloat16 or weight.shape[0] % 32:
            raise RuntimeError(f"{weight.dtype} {tuple(weight.shape)} is not supported!\nMore.")
        plain = weight.as_subclass(torch.Tensor).clone()
        seen.append(plain)
        return plain

    convert_one = semi_structured._converted
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", convert)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(
        semi_structured, "_converted", lambda weight, by: convert_one(weight.detach().as_subclass(Cuda), by)
    )
    return seen


def test_every_linear_layer_with_a_two_of_four_weight_is_converted(accepting: list[torch.Tensor]) -> None:
    model = nn.Sequential(two_of_four(64, 128), nn.ReLU(), nn.Linear(64, 64, dtype=torch.bfloat16), two_of_four(32, 64))
    before = [layer.weight.detach().clone() for layer in (model[0], model[2], model[3])]
    dense = model[2].weight
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert spartan.to_semi_structured(model) is model
    assert len(accepting) == 2
    torch.testing.assert_close(accepting[0], before[0], rtol=0, atol=0)
    torch.testing.assert_close(accepting[1], before[2], rtol=0, atol=0)
    assert model[2].weight is dense
    assert not model[0].weight.requires_grad
    assert not model[3].weight.requires_grad


def test_weights_that_stay_dense_are_named_with_the_reason(accepting: list[torch.Tensor]) -> None:
    model = nn.Sequential(two_of_four(64, 128), two_of_four(64, 64, dtype=torch.float64), two_of_four(24, 64))
    said = r"densely: 1\.weight \(torch.float64 \(64, 64\) is not supported!\), 2\.weight \(.* \(24, 64\) is not"
    with pytest.warns(UserWarning, match=said):
        spartan.to_semi_structured(model)
    assert len(accepting) == 1


def test_an_old_device_is_refused(accepting: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=REFUSED + r"weight \(its device has compute capability 7\.5, below 8\.0\)"):
        spartan.to_semi_structured(two_of_four(64, 128))


def test_a_refusal_leaves_every_layer_as_it_was(accepting: list[torch.Tensor]) -> None:
    model = nn.Sequential(two_of_four(24, 128), two_of_four(40, 64))
    weights = [layer.weight for layer in model]
    with pytest.raises(ValueError, match=r"0\.weight .*, 1\.weight"):
        spartan.to_semi_structured(model)
    assert all(layer.weight is weight for layer, weight in zip(model, weights, strict=True))


def test_a_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match=REFUSED + r"weight \(it is on cpu, not on a CUDA device\)"):
        spartan.to_semi_structured(two_of_four(64, 128))


def test_a_model_without_two_of_four_is_refused() -> None:
    with pytest.raises(ValueError, match=REFUSED + "none is 2:4"):
        spartan.to_semi_structured(nn.Linear(64, 64))


def test_three_of_four_is_not_two_of_four() -> None:
    layer = two_of_four(64, 64)
    with torch.no_grad():
        layer.weight[5, 8:12] = torch.tensor([1.0, 2.0, 3.0, 0.0])
    with pytest.raises(ValueError, match="none is 2:4"):
        spartan.to_semi_structured(layer)


def test_zeros_along_the_outputs_are_not_two_of_four() -> None:
    layer = two_of_four(64, 64)
    layer.weight = nn.Parameter(layer.weight.detach().mT.contiguous())
    with pytest.raises(ValueError, match="none is 2:4"):
        spartan.to_semi_structured(layer)


def test_a_masked_model_is_refused() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    spartan.Sparsifier(model, spartan.Spartan(pattern=(2, 4), sparsity=0.5), total_steps=5, include="*")
    with pytest.raises(ValueError, match="still masked at '0'"):
        spartan.to_semi_structured(model)


def test_layers_with_hooks_and_shared_weights_stay_dense(accepting: list[torch.Tensor]) -> None:
    hooked, first, second = two_of_four(64, 64), two_of_four(64, 64), two_of_four(64, 64)
    hooked.register_forward_hook(lambda module, inputs, output: output)
    second.weight = first.weight
    model = nn.Sequential(hooked, first, second)
    with pytest.raises(
        ValueError, match=r"0\.weight \(its layer has hooks\), 1\.weight \(it is shared with 2\.weight\)"
    ):
        spartan.to_semi_structured(model)
    assert not accepting


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_converted_layer_computes_the_same() -> None:
    layer = two_of_four(256, 512).cuda().eval()
    x = torch.randn(128, 512, dtype=torch.bfloat16, device="cuda")
    expected = layer(x).double()
    got = spartan.to_semi_structured(layer)(x).double()
    assert float((got - expected).abs().max() / expected.abs().max()) < 2e-2
