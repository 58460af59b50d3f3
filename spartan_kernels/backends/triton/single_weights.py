"""Products of few tokens with packed single weights: bound by bytes, and by how x is gathered.

Threads side by side take weights side by side of one row, whose columns rise: together they read a few cache lines of
x. Each weight is read once for up to `TOKEN_GROUP` tokens. Columns are read in 2 bytes where they fit, from a copy that
is made once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch.utils.weak import WeakTensorKeyDictionary

from spartan_kernels.backends.triton.block_matrix import tokens_of
from spartan_kernels.backends.triton.configs import CompileCase, compile_case, name_of, power_of_two
from spartan_kernels.backends.triton.launches import Launch, start
from spartan_kernels.backends.triton.masked_matmul_kernels import activated
from spartan_kernels.backends.triton.product_launches import pointer_or
from spartan_kernels.break_even import TOKEN_GROUP
from spartan_kernels.operands import PackedLinear

_STEP = 256  # weights in flight for each warp
_SHORTEST = 32  # part of a row in one step
_MOST_WARPS, _ENOUGH_WARPS = 4, 4096  # of one program; of a launch: only where there are fewer do some share a row
_NARROW = torch.int16  # of columns below 2^15


@triton.jit(do_not_specialize=["tokens", "out"])
def _single_weights_kernel(
    x_ptr, values_ptr, columns_ptr, offsets_ptr, order_ptr, bias_ptr, y_ptr, saved_ptr, tokens, out, stride_x,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, SAVE: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """act(x w^T + b) for TOKENS tokens and ROWS rows of w, which are about as long, in steps of WIDTH weights each."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    inside = place < out
    row = tl.load(order_ptr + place, inside, other=0)
    first = tl.load(offsets_ptr + row, inside, other=0)
    count = tl.load(offsets_ptr + row + 1, inside, other=0) - first
    values_ptr += first[:, None]
    columns_ptr += first[:, None]
    # a token past the last reads the last one, so that no load is masked for it
    x_ptr += (tl.minimum(token, tokens - 1).to(tl.int64) * stride_x)[:, None, None]
    sums = tl.zeros((TOKENS, ROWS, WIDTH), tl.float32)
    for step in range(0, tl.max(count), WIDTH):
        k = step + tl.arange(0, WIDTH)[None, :]
        kept = k < count[:, None]
        column = tl.load(columns_ptr + k, kept, other=0).to(tl.int32)
        value = tl.load(values_ptr + k, kept, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + column[None], kept[None], other=0.0).to(tl.float32)
        sums += value[None] * x

    z = tl.sum(sums, 2)
    if HAS_BIAS:
        z += tl.load(bias_ptr + row, inside, other=0.0).to(tl.float32)[None, :]
    at = token.to(tl.int64)[:, None] * out + row[None, :]
    inside = (token < tokens)[:, None] & inside[None, :]
    if SAVE:
        tl.store(saved_ptr + at, z.to(saved_ptr.dtype.element_ty), inside)
    tl.store(y_ptr + at, activated(z, ACTIVATION).to(y_ptr.dtype.element_ty), inside)


def single_weights_product(o: PackedLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """act(x w^T + b) of few tokens, w in blocks of one weight, and the sums before the activation.

    A weight that is not stored has no part in it, whatever x is there.
    """
    flat, dtype = tokens_of(o.x), o.x.dtype
    y = torch.empty((*o.x.shape[:-1], o.out), dtype=dtype, device=o.x.device)
    saved = torch.empty_like(y) if o.save else torch.empty(0, dtype=dtype, device=o.x.device)
    if y.numel() == 0:
        return y, saved
    offsets, columns, order = o.layout[0], o.layout[1], o.layout[4]
    arguments = (
        flat, o.values.contiguous(), _narrowed(columns, flat.shape[1]), offsets, order, pointer_or(o.bias, flat), y,
        saved if o.save else y, flat.shape[0], o.out, flat.stride(0),
    )  # fmt: skip
    flags = {"HAS_BIAS": o.bias is not None, "ACTIVATION": o.activation, "SAVE": o.save}
    tile = _tile(o.out, o.values.shape[0], flat.shape[0])
    grid = triton.cdiv(o.out, tile["ROWS"]), triton.cdiv(flat.shape[0], tile["TOKENS"])
    start(Launch(_single_weights_kernel, grid, arguments, flags | tile))
    return y, saved


def _tile(out: int, kept: int, tokens: int) -> dict[str, int]:
    """Tokens, rows and weights of a step of one program: mostly a warp for each row, or for several short ones."""
    row = power_of_two(kept // out)
    warps = max(1, min(_MOST_WARPS, row // _STEP, _ENOUGH_WARPS // out))
    warps = power_of_two(warps + 1) // 2
    width = min(_STEP * warps, max(_SHORTEST, row))
    group = min(TOKEN_GROUP, power_of_two(tokens))
    return {"TOKENS": group, "ROWS": max(1, _STEP // width), "WIDTH": width, "num_warps": warps}


@dataclass
class _Copy:
    """Columns in 2 bytes.

    Attributes:
        version: of the tensor when it was copied.
        ready: when the copy is written, for streams that did not write it; None: it is.
    """

    columns: torch.Tensor
    version: int
    ready: torch.cuda.Event | None
    stream: int

    def usable(self) -> bool:
        """Whether the current stream may read it."""
        if self.ready is not None and self.stream != torch.cuda.current_stream(self.columns.device).cuda_stream:
            # a graph is captured after a warm-up, which it waits for; asking would break it
            if not torch.cuda.is_current_stream_capturing() and not self.ready.query():
                return False
            self.ready = None
        return True


_copies = WeakTensorKeyDictionary()


def _narrowed(columns: torch.Tensor, in_: int) -> torch.Tensor:
    """Columns in 2 bytes if they fit, copied again after a change in place; else as they are.

    They are as they are, too, where no copy can be kept: while a graph is captured, or where PyTorch counts no changes.
    """
    if in_ > torch.iinfo(_NARROW).max + 1 or columns.is_inference():
        return columns
    copy = _copies.get(columns)
    if copy is None or copy.version != columns._version:
        if columns.is_cuda and torch.cuda.is_current_stream_capturing():
            return columns
        copy = _copies[columns] = _copied(columns)
    return copy.columns if copy.usable() else columns


def _copied(columns: torch.Tensor) -> _Copy:
    narrow = columns.to(_NARROW)
    if not columns.is_cuda:
        return _Copy(narrow, columns._version, None, 0)
    stream = torch.cuda.current_stream(columns.device)
    return _Copy(narrow, columns._version, stream.record_event(), stream.cuda_stream)


def _compile_cases() -> list[CompileCase]:
    """Rows of 800 weights, few of such rows, and rows of 20."""
    found, layer = [], (4096, 800)
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (1, 2, TOKEN_GROUP):
            found.append(_case(dtype, "i16", layer, tokens, f"tokens {tokens}, {name_of(dtype)}"))
    found.append(_case(torch.bfloat16, "i32", layer, 1, "columns of 4 bytes, bf16"))
    found.append(_case(torch.bfloat16, "i16", (1000, 800), TOKEN_GROUP, "few rows, bf16"))
    found.append(_case(torch.bfloat16, "i16", (4096, 20), TOKEN_GROUP, "short rows, bf16"))
    return found


def _case(dtype: torch.dtype, columns: str, layer: tuple[int, int], tokens: int, label: str) -> CompileCase:
    types, (out, row) = {"columns": f"*{columns}", "offsets": "*i32", "order": "*i32"}, layer
    tile = _tile(out, out * row, tokens)
    options: dict[str, Any] = {"HAS_BIAS": True, "ACTIVATION": "", "SAVE": False, **tile}
    return compile_case(_single_weights_kernel, dtype, options, label, types, ("stride_x",))


COMPILE_CASES = _compile_cases()
