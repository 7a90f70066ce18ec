"""C += X Xᵀ of 16-bit numbers on tensor cores, as exact as float32 products that are rounded to nearest.

A tensor core adds to a float32 sum by cutting off what does not fit. Over a thousand tokens whose channels have a mean,
that makes entries some 40 · 2⁻²⁴ too small, far more than a small direction of C has. Here it adds up `STEP` tokens, from
zero; these sums are added by ordinary float32 instructions, and the sum of a call in float64.
"""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

TILE, STEP = 128, 64  # channels of a tile of C; tokens


@triton.jit
def _add(x, total, tokens, d, x_row, total_row, TILE: tl.constexpr, STEP: tl.constexpr):
    down, across = tl.program_id(0), tl.program_id(1)
    if across <= down:
        i, j = down * TILE + tl.arange(0, TILE), across * TILE + tl.arange(0, TILE)
        lacking = tl.zeros((TILE, TILE), tl.float32)
        for start in range(0, tokens, STEP):
            k = start + tl.arange(0, STEP)
            row, there = x + k.to(tl.int64) * x_row, k < tokens
            a = tl.load(row[None, :] + i[:, None], mask=there[None, :] & (i < d)[:, None], other=0.0)
            b = tl.load(row[:, None] + j[None, :], mask=there[:, None] & (j < d)[None, :], other=0.0)
            lacking -= tl.dot(a, b)  # subtracted: a sum would be made the start of the tensor core's own
        place = total + i.to(tl.int64)[:, None] * total_row + j[None, :]
        inside = (i < d)[:, None] & (j < d)[None, :]
        tl.store(place, tl.load(place, mask=inside) - lacking.to(tl.float64), mask=inside)


def add_gram(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Add rowsᵀ rows to the tiles of `total` that reach its diagonal or lie below it, in place.

    Args:
        total: (d, d) float64.
        rows: (tokens, d) bfloat16 or float16, on the same GPU.
    """
    rows = rows.contiguous()
    tokens, d = rows.shape
    tiles = triton.cdiv(d, TILE)
    with torch.cuda.device_of(rows):
        _add[(tiles, tiles)](
            rows, total, tokens, d, rows.stride(0), total.stride(0), TILE=TILE, STEP=STEP, num_warps=8, num_stages=3
        )
