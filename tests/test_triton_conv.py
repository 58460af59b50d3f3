"""What surrounds the convolution kernels of Triton: divisions, tiles, phases, and when a GPU convolves with blocks."""

from __future__ import annotations

import importlib.util
import itertools
import random

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from spartan.nn import MaskedConv2d, mask_weight
from spartan_kernels.ops.masked_conv import dense_wins

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
def test_kernels_divide_exactly_by_any_number_of_pixels() -> None:
    from spartan_kernels.backends.triton.conv_lines import multiplier

    drawn, most = random.Random(1), (1 << 31) - 1
    for divisor in [*range(2, 700), *(drawn.randrange(2, most) for _ in range(2000)), 1 << 30, most]:
        m, s = multiplier(divisor)
        assert -(1 << 31) <= m < 1 << 31 and 0 <= s < 32
        last = most // divisor * divisor
        for n in {0, divisor - 1, divisor, last - 1, last, most, drawn.randrange(most)}:
            assert n // divisor == (n * (m % (1 << 32)) >> 32) >> s, (n, divisor)


@needs_triton
@pytest.mark.parametrize("scattered", [False, True])
def test_tiles_fill_a_gpu_and_divide_blocks(scattered: bool) -> None:
    from spartan_kernels.backends.triton.conv_lines import convolution_tile, sampled_tile

    sizes = itertools.product((80, 90), ("float32", "tf32", "bfloat16"), (1, 49, 12544), (3, 16, 96, 128), (3, 24, 64))
    for architecture, kind, pixels, span, other in sizes:
        for tile in (
            convolution_tile(architecture, pixels, 8, span, other, kind, scattered),
            sampled_tile(architecture, 9 * other, span, kind, scattered),
        ):
            assert all(side >= 16 and side & (side - 1) == 0 for side in (tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K))
            assert not tile.TMA and tile.BLOCK_M * tile.BLOCK_K <= (32 * 128 if scattered else 256 * 64)
    few = convolution_tile(90, 49 * 64, 4, 32, 32, "bfloat16", False)
    many = convolution_tile(90, 1 << 20, 4, 32, 32, "bfloat16", False)
    assert few.BLOCK_M == 64 and many.BLOCK_M == 256
    assert many.BLOCK_K == 32  # of one block, where a default tile has the columns of two


@needs_triton
@pytest.mark.parametrize(("stride", "padding", "dilation", "kernel"), [(1, 0, 1, 1), (2, 1, 1, 3), (3, 4, 2, 5)])
def test_every_term_of_an_input_gradient_is_in_one_phase(stride: int, padding: int, dilation: int, kernel: int) -> None:
    from spartan_kernels.backends.triton.conv_lines import Walk

    class Settings:
        pass

    o = Settings()
    o.stride, o.padding, o.dilation = [stride, stride], [padding, padding], [dilation, dilation]  # type: ignore[attr-defined]
    walk, out = Walk.of_input(o, (kernel, kernel)), 7
    expected = sorted((row * stride + k * dilation - padding, row, k) for row in range(out) for k in range(kernel))
    found = []
    for phase, k, u in itertools.product(range(walk.jump[0]), range(kernel), range(-20, 40)):
        shift, rest = divmod(phase + walk.base[0] + walk.walk[0] * k, walk.jump[0])
        if rest == 0 and 0 <= u + shift < out:
            found.append((phase + walk.jump[0] * u, u + shift, k))
    assert sorted(found) == expected


def test_a_gpu_convolves_with_wide_blocks_and_nobody_reads_the_density(monkeypatch: pytest.MonkeyPatch) -> None:
    served = "triton"
    monkeypatch.setattr("spartan_kernels.dispatch.select", lambda *_: served)
    with FakeTensorMode():  # which holds no numbers
        image, weight = torch.empty(2, 64, 9, 9, device="cuda"), torch.empty(64, 64, 3, 3, device="cuda")
        gate = torch.empty(4, 4, 3, 3, device="cuda")
    assert dense_wins(image, weight, gate, 8) and not dense_wins(image, weight, gate, 16)

    def layer(side: int) -> MaskedConv2d:
        conv = mask_weight(nn.Conv2d(64, 64, 3), (side, side), soft=False)
        assert isinstance(conv, MaskedConv2d)
        return conv

    assert layer(8)._dense_wins(image) and not layer(16)._dense_wins(image)
    served = "reference"
    assert layer(16)._dense_wins(image)
