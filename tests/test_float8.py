"""block_sparse_linear with weights in 8 bits: against float64 products of the rounded numbers and of the exact ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import spartan
from spartan import BlockSparseWeight
from spartan_kernels import float8
from spartan_kernels.testing import ACTIVATIONS, assert_within_error_budget, make_values, oracle_expand_blocks

pytestmark = [
    pytest.mark.operators("block_sparse_linear_float8_forward"),
    pytest.mark.usefixtures("poisoned_memory"),
]

HALF_STEP = 2.0**-4  # of a number with 3 bits of mantissa, relative to it
HALF_SMALLEST = 2.0**-10  # of what the format tells apart near zero


def weight_of(out: int, in_: int, block: tuple[int, int], density: float, seed: int, dtype: torch.dtype) -> Any:
    """A weight whose rows differ in size, zero outside of its blocks, packed with all blocks of a mask."""
    grid = (-(-out // block[0]), -(-in_ // block[1]))
    mask = make_values("uniform", grid, seed=seed) < density
    sizes = torch.exp(make_values("normal", (out, 1), seed=seed + 1))
    weight = (make_values("normal", (out, in_), seed=seed + 2) * sizes).to(dtype)
    weight = torch.where(oracle_expand_blocks(mask, (out, in_), block), weight, 0.0)
    return weight, BlockSparseWeight.from_dense(weight, block, mask)


def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The oracle of rounding: rows times 1 / scale to 3 bits of mantissa, exponents from -6 on; and scales."""
    scales = (rows.float().abs().amax(-1, keepdim=True) / 448).clamp(min=2.0**-126)
    numbers = (rows.float() * (1 / scales)).double()
    exponents = torch.frexp(numbers)[1].clamp(min=-5) - 4  # frexp counts mantissas from one half on
    steps = torch.ldexp(torch.ones_like(numbers), exponents)
    return torch.round(numbers / steps) * steps, scales.double()


def largest_error(rows: Tensor) -> Tensor:
    """What rounding may change in each entry."""
    exact = rows.double().abs()
    return (HALF_STEP * exact + HALF_SMALLEST * exact.amax(-1, keepdim=True) / 448) * (1 + 1e-6)


@given(
    tokens=st.lists(st.integers(0, 9), max_size=2),
    out=st.integers(1, 40),
    in_=st.integers(1, 40),
    block=st.tuples(st.integers(1, 33), st.integers(1, 33)),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    activation=st.sampled_from(list(ACTIVATIONS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_value_against_both_products_in_float64(
    target: Any,
    tokens: list[int],
    out: int,
    in_: int,
    block: tuple[int, int],
    density: float,
    activation: str | None,
    dtype: torch.dtype,
    has_bias: bool,
    seed: int,
) -> None:
    weight, packed = weight_of(out, in_, block, density, seed, torch.float32)
    x = make_values("normal", (*tokens, in_), seed=seed + 3, dtype=dtype)
    bias = make_values("normal", (out,), seed=seed + 4, dtype=dtype) if has_bias else None
    ours = spartan.block_sparse_linear(
        x.to(target.device),
        small_on(packed, target.device),
        None if bias is None else bias.to(target.device),
        activation,
        backend=target.backend,
    ).cpu()
    assert ours.dtype == dtype and ours.shape == (*tokens, out)

    (x8, s_x), (w8, s_w) = rounded(x), rounded(weight)
    offset = 0.0 if bias is None else bias.double()
    z = functional.linear(x8, w8) * s_x * s_w[:, 0] + offset
    want = ACTIVATIONS[activation](z)
    largest = float((functional.linear(x8.abs(), w8.abs()) * s_x * s_w[:, 0]).max()) if want.numel() else 0.0
    floor = 4 * torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps * (1 + largest)
    assert_within_error_budget(ours, want, want.to(dtype), floor=floor, name="y")

    exact = functional.linear(x.double(), weight.double()) + offset
    e_x, e_w, a_x, a_w = largest_error(x), largest_error(weight), x.double().abs(), weight.double().abs()
    bound = functional.linear(e_x, a_w) + functional.linear(a_x + e_x, e_w)
    assert bool(((z - exact).abs() <= bound + 1e-12).all())


def small_on(packed: BlockSparseWeight, device: str) -> BlockSparseWeight:
    """The packed weight on a device, in 8 bits."""
    mask = packed.layout.mask().to(device)
    return BlockSparseWeight.from_dense(packed.to_dense().to(device), packed.block_size, mask).to_float8()


def test_rounding_is_to_the_nearest_and_even() -> None:
    """Every number of 8 bits, and what lies between neighbours."""
    numbers = torch.arange(256, dtype=torch.uint8).view(float8.FLOAT8).float()
    numbers = numbers[numbers.isfinite()].unique()
    between = (numbers[1:] + numbers[:-1]) / 2
    rows = torch.cat([numbers, between, torch.nextafter(between, numbers[1:]), torch.nextafter(between, numbers[:-1])])
    values, scales = float8.rounded_rows(rows[None])
    assert float(scales) == 1.0
    assert torch.equal(values.double(), rounded(rows[None])[0])
    assert torch.equal(values[0, : len(numbers)].float(), numbers)


def test_sums_over_a_long_depth_are_of_float32(target: Any) -> None:
    """All terms are positive: sums of fewer bits would lose what they add late."""
    x, weight = (make_values("uniform", (64, 16384), seed=seed) + 0.5 for seed in (0, 1))
    packed = small_on(BlockSparseWeight.from_dense(weight, 64), target.device)
    y = spartan.block_sparse_linear(x.to(target.device), packed, backend=target.backend).cpu()
    (x8, s_x), (w8, s_w) = rounded(x), rounded(weight)
    want = functional.linear(x8, w8) * s_x * s_w[:, 0]
    assert float(((y - want) / want).abs().max()) < 4e-6


@pytest.mark.parametrize("features", [1, 130, 2500])
def test_triton_rounds_as_the_reference_does(target: Any, features: int) -> None:
    """To the last bit; halfway cases too, and rows whose scale is not a power of two."""
    if target.backend != "triton":
        pytest.skip("is of the Triton backend")
    from spartan_kernels.backends.triton.block_sparse import _rounded_rows

    numbers = torch.arange(256, dtype=torch.uint8).view(float8.FLOAT8).float()
    numbers = numbers[numbers.isfinite()]
    x = make_values("normal", (6, features), seed=1) * torch.tensor([[1.0], [1e-30], [1e30], [0.0], [1e-42], [3.0]])
    x[5] = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2]).flip(0).repeat(6)[:features]
    values, scales = _rounded_rows(x.to(target.device))
    want, of_rows = float8.rounded_rows(x)
    assert torch.equal(scales.cpu(), of_rows[:, 0])
    assert torch.equal(values.cpu().float(), want.float())


@pytest.mark.parametrize(("shape", "tokens"), [((5, 0), (3,)), ((0, 7), (3,)), ((5, 7), (0,)), ((5, 7), (2, 0))])
def test_what_is_empty_gives_the_bias(target: Any, shape: tuple[int, int], tokens: tuple[int, ...]) -> None:
    out, in_ = shape
    packed = small_on(BlockSparseWeight.from_dense(torch.ones(shape), 2), target.device)
    x, bias = (make_values("normal", size, seed=1, device=target.device) for size in ((*tokens, in_), (out,)))
    y = spartan.block_sparse_linear(x, packed, bias, backend=target.backend)
    assert torch.equal(y, bias.expand(*tokens, out))


def test_a_token_of_zeros_stays_zero_and_tiny_ones_are_no_division_by_zero(target: Any) -> None:
    _, packed = weight_of(20, 24, (8, 8), 0.6, 0, torch.float32)
    x = make_values("normal", (4, 24), seed=1)
    x[1], x[2] = 0.0, x[2] * 1e-44
    bias = make_values("normal", (20,), seed=2)
    packed = small_on(packed, target.device)
    y = spartan.block_sparse_linear(x.to(target.device), packed, bias.to(target.device), backend=target.backend).cpu()
    assert torch.equal(y[1], bias)
    torch.testing.assert_close(y[2], bias, rtol=0, atol=1e-30)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_what_is_not_finite_makes_all_outputs_of_its_token_nan(
    target: Any, value: float, activation: str | None
) -> None:
    """Of outputs without blocks too."""
    _, packed = weight_of(20, 24, (8, 8), 0.6, 0, torch.float32)
    x = make_values("normal", (5, 24), seed=1)
    x[3, 23] = value
    packed = small_on(packed, target.device)
    y = spartan.block_sparse_linear(x.to(target.device), packed, activation=activation, backend=target.backend).cpu()
    assert bool(y[3].isnan().all()) and not bool(y[[0, 1, 2, 4]].isnan().any())


def test_a_row_of_the_weight_that_is_not_finite_becomes_nan(target: Any) -> None:
    weight, _ = weight_of(20, 24, (8, 8), 1.0, 0, torch.float32)
    weight[5, 3], weight[7, 4] = torch.inf, torch.nan
    packed = BlockSparseWeight.from_dense(weight, 8)
    bad = torch.zeros(20, dtype=torch.bool)
    bad[[5, 7]] = True
    assert torch.equal(packed.to_float8().to_dense().isnan(), bad[:, None].expand(20, 24))
    x = make_values("normal", (3, 24), seed=1, device=target.device)
    y = spartan.block_sparse_linear(x, small_on(packed, target.device), backend=target.backend).cpu()
    assert torch.equal(y.isnan(), bad.expand(3, 20))


@given(
    out=st.integers(1, 20),
    in_=st.integers(0, 20),
    block=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    density=st.sampled_from([0.0, 0.4, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_packing_keeps_blocks_dtype_and_numbers_within_a_rounding(
    out: int, in_: int, block: tuple[int, int], density: float, dtype: torch.dtype, seed: int
) -> None:
    weight, packed = weight_of(out, in_, block, density, seed, dtype)
    small = packed.to_float8()
    assert small.values.dtype == torch.float8_e4m3fn and small.values.shape == packed.values.shape
    assert small.scales is not None and small.scales.shape == (out, 1) and small.to_float8() is small
    assert torch.equal(small.layout.mask(), packed.layout.mask())
    dense, slack = small.to_dense(), 2 * torch.finfo(dtype).eps
    assert dense.dtype == small.dtype == packed.dtype == dtype
    if in_:
        assert bool(((dense - weight).double().abs() <= largest_error(weight) + slack * weight.double().abs()).all())
    turned = small.transposed()
    assert turned.shape == (in_, out) and torch.equal(turned.to_dense(), dense.mT)
    assert torch.equal(turned.transposed().to_dense(), dense)
    small.require_valid()


def test_conversions_hold_the_rounded_numbers() -> None:
    _, packed = weight_of(12, 8, (3, 2), 0.5, 3, torch.float32)
    small = packed.to_float8()
    assert torch.equal(small.to_bsr().to_dense(), small.to_dense())
    assert torch.equal(torch.from_numpy(small.to_scipy().toarray()), small.to_dense())


def test_opcheck_and_compile(target: Any) -> None:
    _, packed = weight_of(7, 9, (3, 4), 0.6, 0, torch.float32)
    packed = small_on(packed, target.device)
    x = make_values("normal", (2, 9), seed=5, device=target.device)
    bias = make_values("normal", (7,), seed=6, device=target.device)
    operator = torch.ops.spartan.block_sparse_linear_float8_forward.default
    index = packed.layout.tensors(), packed.positions
    operands = (x, packed.values, packed.scales, *index, bias, "gelu", 7, target.backend)
    # the check of the schema multiplies what it is given, which PyTorch cannot in 8 bits
    torch.library.opcheck(operator, operands, test_utils=("test_autograd_registration", "test_faketensor"))

    def layer(x: Tensor, bias: Tensor) -> Tensor:
        return spartan.block_sparse_linear(x, packed, bias, "gelu", backend=target.backend)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, bias), layer(x, bias))


def test_a_gradient_is_refused_by_name(target: Any) -> None:
    _, packed = weight_of(7, 9, (3, 4), 0.6, 0, torch.float32)
    packed = small_on(packed, target.device)
    x = make_values("normal", (2, 9), seed=5, device=target.device)
    for needs in ((True, False), (False, True)):
        bias = torch.zeros(7, device=target.device).requires_grad_(needs[1])
        y = spartan.block_sparse_linear(x.requires_grad_(needs[0]), packed, bias, backend=target.backend)
        with pytest.raises(RuntimeError, match=r"block_sparse_linear has no gradient .* 8 bits \(float8\)"):
            y.sum().backward()


def test_autocast_casts_x_and_bias_but_not_the_weight(target: Any) -> None:
    _, packed = weight_of(7, 9, (3, 4), 0.6, 0, torch.float32)
    packed = small_on(packed, target.device)
    x = make_values("normal", (2, 9), seed=5, device=target.device)
    bias = make_values("normal", (7,), seed=6, device=target.device)
    with torch.autocast(target.device, torch.bfloat16):
        y = spartan.block_sparse_linear(x, packed, bias, backend=target.backend)
    half = spartan.block_sparse_linear(x.bfloat16(), packed, bias.bfloat16(), backend=target.backend)
    assert y.dtype == torch.bfloat16 and torch.equal(y, half)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda w: spartan.block_sparse_linear(torch.ones(3, 4).int(), w), TypeError, "x.*int32"),
        (lambda w: spartan.block_sparse_linear(torch.ones(3, 4).double(), w), ValueError, "x.*float16.*float64"),
        (lambda w: spartan.block_sparse_linear(torch.ones(3, 4).to(w.values.dtype), w), ValueError, "x must be.*got"),
        (lambda w: spartan.block_sparse_linear(torch.ones(3, 5), w), ValueError, r"x.*4.*\(3, 5\)"),
        (lambda w: spartan.block_sparse_linear(torch.ones(3, 4), w, torch.ones(6).half()), ValueError, "bias.*float16"),
        (lambda w: spartan.block_sparse_linear(torch.ones(3, 4), w, None, "swish"), ValueError, "activation.*swish"),
        (lambda w: spartan.block_sparse_linear(torch.ones(3, 6), w.transposed()), ValueError, r"scales.*\(4, 1\)"),
        (lambda w: BlockSparseWeight(w.values, w.layout, w.positions), ValueError, "scales.*no scales"),
        (lambda w: BlockSparseWeight(w.values.float(), *rest(w)), ValueError, "scales.*float32"),
        (lambda w: BlockSparseWeight(w.values, *rest(w)[:2], w.scales[:5], w.dtype), ValueError, r"scales.*\(5, 1\)"),
        (lambda w: BlockSparseWeight(w.values, *rest(w)[:2], w.scales.half(), w.dtype), ValueError, "scales.*float16"),
    ],
)
def test_bad_input_is_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"(?is){message}"):
        call(BlockSparseWeight.from_dense(torch.ones(6, 4), 2).to_float8())


def rest(w: BlockSparseWeight) -> Any:
    return w.layout, w.positions, w.scales, w.rounded_from
