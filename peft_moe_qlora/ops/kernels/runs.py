"""Runs of rows of one expert, whose sums are added later, for gradients of factors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .gemm_operands import padded_rank
from .launch import cdiv, launch, next_power_of_2
from .schedule import Tiles

ROWS_OF_A_STEP = 32
COLUMNS_OF_A_PROGRAM = 128
SERIAL_ROWS = 512
"""Number of rows of an expert above which they are summed in several runs, with another launch for the total."""
ENOUGH_PROGRAMS = 1024
"""Number of programs that occupies all multiprocessors of a large GPU."""


PARTS_BYTES = 32 * 2**20
"""Limit on the memory for sums of runs of rows."""


def rows_of_a_run(num_rows: int, num_experts: int, columns: int, rank: int) -> int | None:
    """Largest number of rows of an expert that one program sums in a factor gradient; None for all rows.

    Chosen from the mean, since row counts are known only on the device. Rows are split if there are many, since
    routing may concentrate them on a few experts, and if there are too few experts to occupy the GPU.

    Args:
        num_rows: number of rows, S.
        num_experts: number of experts, E.
        columns: features of the rows.
        rank: rank of the factors.
    """
    mean = cdiv(num_rows, num_experts)
    programs = num_experts * cdiv(columns, COLUMNS_OF_A_PROGRAM)
    # enough programs for even routing
    length = max(next_power_of_2(mean * programs // ENOUGH_PROGRAMS), 4 * ROWS_OF_A_STEP)
    if mean < 2 * length:
        # with few rows in total, no expert has many
        if num_rows < 16 * SERIAL_ROWS:
            return None
        # twice the mean: with even routing, no expert is split
        length = max(next_power_of_2(2 * mean), SERIAL_ROWS)
    while num_parts(num_rows, length) * columns * rank * 4 > PARTS_BYTES and length < num_rows:
        length *= 2
    return length if length < num_rows else None


def num_parts(num_rows: int, length: int) -> int:
    return 2 * (num_rows // length + 1)


def parts_of_runs(runs: Tiles | None, ends: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, int, int, int]:
    """Runs of a launch, their largest number, their length, and half of the number of parts; None: whole experts."""
    if runs is None:
        return ends, ends.shape[0], 0, 0
    (length,) = runs.heights
    return runs.tiles, runs.bound, length, num_parts(num_rows, length) // 2


@triton.jit
def _place_of_part(start, rows, half, LENGTH: tl.constexpr):
    """Slot for the sum of a run of an expert with several runs; there are `2 * half` slots.

    Full runs start at least `LENGTH` apart. A shorter run follows a full one and uses the same slot in the other half.
    """
    return tl.where(rows == LENGTH, start // LENGTH, half + start // LENGTH - 1)


@triton.jit
def run_of_expert(ENDS, RUNS, bound, LENGTH: tl.constexpr):
    """Expert, first row, end, and whether these are all rows of the expert, for program `(_, run)`.

    The expert is negative after the last run. With a `LENGTH` of 0, a run is an expert.
    """
    if LENGTH == 0:
        expert = tl.program_id(1)
        start = tl.load(ENDS + expert - 1, mask=expert > 0, other=0)
        end = tl.load(ENDS + expert)
        is_whole = end >= start  # always: both branches return a tensor
    else:
        expert = tl.load(RUNS + tl.program_id(1))
        start = tl.load(RUNS + bound + tl.program_id(1))
        first_of_expert = tl.load(ENDS + expert - 1, mask=expert > 0, other=0)
        end = tl.load(ENDS + expert, mask=expert >= 0, other=0)
        is_whole = end - first_of_expert <= LENGTH
        end = tl.minimum(end, start + LENGTH)
    return expert, start, end, is_whole


@triton.jit
def store_gradient(acc, OUT, PARTS, run, column, is_column, SHAPE: tl.constexpr):
    """Stores columns of a factor's gradient: to `OUT`, or to `PARTS (2 * half, columns, rank)` if the expert has runs.

    `run` is (expert, first row, number of rows, half, whether these are all rows of the expert), `SHAPE` is (columns,
    rank, strides of OUT, length of runs).
    """
    expert, start, num_rows, half, is_whole = run
    COLUMNS: tl.constexpr = SHAPE[0]
    RANK: tl.constexpr = SHAPE[1]
    STRIDES: tl.constexpr = SHAPE[2]
    LENGTH: tl.constexpr = SHAPE[3]
    r = tl.arange(0, acc.shape[1])
    is_out = is_column[:, None] & (r < RANK)[None, :]
    place = OUT + expert.to(tl.int64) * STRIDES[0] + column[:, None] * STRIDES[1] + r[None, :] * STRIDES[2]
    if LENGTH == 0 or is_whole:
        tl.store(place, acc.to(OUT.dtype.element_ty), mask=is_out)
    else:
        part = _place_of_part(start, num_rows, half, LENGTH)
        # pointers of two dtypes need separate names in the two branches
        place_of_sum = PARTS + part.to(tl.int64) * (COLUMNS * RANK) + column[:, None] * RANK + r[None, :]
        tl.store(place_of_sum, acc, mask=is_out)


@triton.jit(do_not_specialize=["half"])
def _sum_of_runs_kernel(
    PARTS,
    ENDS,
    OUT,
    half,
    STRIDE_OE: tl.constexpr,
    STRIDE_OC: tl.constexpr,
    STRIDE_OR: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """Sums the runs of each expert in order; skips experts with one run, writes zeros for experts without rows."""
    expert = tl.program_id(1)
    start = tl.load(ENDS + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ENDS + expert)
    if (end == start) | (end - start > LENGTH):
        column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        r = tl.arange(0, RANKS)
        is_out = (column < COLUMNS)[:, None] & (r < RANK)[None, :]
        acc = tl.zeros((BLOCK_COLUMNS, RANKS), tl.float32)
        for first in range(start, end, LENGTH):
            part = _place_of_part(first, tl.minimum(end - first, LENGTH), half, LENGTH)
            place_of_sum = PARTS + part.to(tl.int64) * (COLUMNS * RANK) + column[:, None] * RANK + r[None, :]
            acc += tl.load(place_of_sum, mask=is_out, other=0.0)
        place = OUT + expert.to(tl.int64) * STRIDE_OE + column[:, None] * STRIDE_OC + r[None, :] * STRIDE_OR
        tl.store(place, acc.to(OUT.dtype.element_ty), mask=is_out)


def sum_runs(parts: torch.Tensor, ends: torch.Tensor, out: torch.Tensor, length: int) -> None:
    """Adds the sums of runs of experts with several runs, in fp32 in a fixed order.

    Args:
        parts: `(num_parts, C, R)` in fp32.
        ends: `(E,)` int32.
        out: `(E, C, R)` output view with any strides; not written for experts with one run.
        length: largest number of rows of a run.
    """
    num_experts, columns, rank = out.shape
    strides = out.stride()
    launch(
        _sum_of_runs_kernel,
        (cdiv(columns, COLUMNS_OF_A_PROGRAM), num_experts),
        (parts, ends, out),
        (parts.shape[0] // 2,),
        STRIDE_OE=strides[0],
        STRIDE_OC=strides[1],
        STRIDE_OR=strides[2],
        COLUMNS=columns,
        RANK=rank,
        RANKS=padded_rank(rank),
        BLOCK_COLUMNS=COLUMNS_OF_A_PROGRAM,
        LENGTH=length,
    )
