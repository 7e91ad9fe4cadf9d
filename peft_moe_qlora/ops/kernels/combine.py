"""The sum over a token's K rows, weighted or not."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import cdiv, launch, next_power_of_2
from .launch_recorder import allocate
from .schedule import RoutedRows


@triton.jit(do_not_specialize=["num_tokens"])
def _combine_kernel(
    ROWS,
    WEIGHTS,
    ROW_OF_PAIR,
    ENDS,
    OUT,
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    is_token = token < num_tokens
    is_column = column < COLUMNS
    num_rows = tl.load(ENDS + NUM_EXPERTS - 1)
    acc = tl.zeros((TOKENS, WIDTH), tl.float32)
    for choice in range(TOP_K):
        row = tl.load(ROW_OF_PAIR + token * TOP_K + choice, mask=is_token, other=num_rows)
        is_here = row < num_rows
        place = ROWS + row[:, None].to(tl.int64) * COLUMNS + column[None, :]
        part = tl.load(place, mask=is_here[:, None] & is_column[None, :], other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            weight = tl.load(WEIGHTS + token * TOP_K + choice, mask=is_here, other=0.0).to(tl.float32)
            part *= weight[:, None]
        acc += part
    place = OUT + token[:, None].to(tl.int64) * COLUMNS + column[None, :]
    tl.store(place, acc.to(OUT.dtype.element_ty), mask=is_token[:, None] & is_column[None, :])


def combine(
    rows: torch.Tensor,
    weights: torch.Tensor | None,
    routed: RoutedRows,
    num_tokens: int,
    top_k: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`out[t] = sum_k weights[t, k] * rows[row of (t, k)]`, summed in fp32 in the order of k: `(T, columns)`.

    Args:
        rows: `(S, columns)`.
        weights: `(T, K)`, contiguous; None for ones.
        routed: positions of the rows; pairs that are not computed here count as zero.
        num_tokens: T.
        top_k: K.
        dtype: dtype of the result.
    """
    columns = rows.shape[1]
    out = allocate((num_tokens, columns), dtype, rows.device)
    width = min(1024, next_power_of_2(columns))
    tokens = max(1, min(4, 1024 // width))
    launch(
        _combine_kernel,
        (cdiv(num_tokens, tokens), cdiv(columns, width)),
        (rows, rows if weights is None else weights, routed.row_of_pair, routed.ends, out),
        (num_tokens,),
        NUM_EXPERTS=routed.ends.shape[0],
        COLUMNS=columns,
        TOP_K=top_k,
        HAS_WEIGHTS=weights is not None,
        TOKENS=tokens,
        WIDTH=width,
    )
    return out
