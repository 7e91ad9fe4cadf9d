"""The layer's forward for a few tokens, as in generation: every routed pair by itself, vectors instead of tiles.

Nothing is sorted, and no matrix instruction waits for rows that aren't there. An expert that several tokens chose is
decoded for each of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..operands import Gate, PackedWeight
from .code_tables import CodeTable, code_table, runs_ptx
from .decode import kernel_tensors, load_scales, look_up_codes
from .gate import gate_value
from .launch import cdiv, launch, next_power_of_2
from .tape import allocate

LARGEST_BLOCKSIZE = 512


@triton.jit
def _reduce_pairs_kernel(
    X,
    IDS,
    FACTOR,
    OUT,
    scaling,
    NUM_EXPERTS: tl.constexpr,
    K: tl.constexpr,
    RANK: tl.constexpr,
    TOP_K: tl.constexpr,
    RANKS: tl.constexpr,
    TILE_K: tl.constexpr,
):
    pair = tl.program_id(0)
    expert = tl.load(IDS + pair)
    if (expert >= 0) & (expert < NUM_EXPERTS):
        r = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
        acc = tl.zeros((RANKS, TILE_K), tl.float32)
        for first in range(0, K, TILE_K):
            k = first + tl.arange(0, TILE_K)
            x = tl.load(X + (pair // TOP_K).to(tl.int64) * K + k, mask=k < K, other=0.0)
            place = FACTOR + expert.to(tl.int64) * (RANK * K) + r[:, None] * K + k[None, :]
            factor = tl.load(place, mask=(r < RANK)[:, None] & (k < K)[None, :], other=0.0)
            # rounded as the matrix instructions of the other path need it
            acc += factor.to(x.dtype).to(tl.float32) * x.to(tl.float32)[None, :]
        tl.store(OUT + pair * RANK + r, (tl.sum(acc, 1) * scaling).to(OUT.dtype.element_ty), mask=r < RANK)


def reduce_pairs(
    x: torch.Tensor, top_k_index: torch.Tensor, A: torch.Tensor, scaling: float, top_k: int
) -> torch.Tensor:
    """`scaling * A[expert of p] @ x[p // top_k]` for each pair p: `(P, R)` in the dtype of x.

    Args:
        x: `(T, K)`, or `(P, K)` with `top_k` 1; contiguous.
        top_k_index: `(T, K)` ids, contiguous; rows of pairs outside `[0, E)` are left as they were allocated.
        A: `(E, R, K)` contiguous, any floating dtype; rounded to that of x.
        scaling: factor of the product.
        top_k: pairs of a row of x.
    """
    num_experts, rank, in_features = A.shape
    num_pairs = top_k_index.numel()
    out = allocate((num_pairs, rank), x.dtype, x.device)
    ranks = 2
    launch(
        _reduce_pairs_kernel,
        (num_pairs, cdiv(rank, ranks)),
        (x, top_k_index, A, out),
        (scaling,),
        NUM_EXPERTS=num_experts,
        K=in_features,
        RANK=rank,
        TOP_K=top_k,
        RANKS=ranks,
        TILE_K=min(1024, next_power_of_2(in_features)),
    )
    return out


@triton.jit
def _outputs(
    x_place,
    W,
    ABSMAX,
    NESTED,
    OFFSET,
    MAP,
    expert,
    first_output,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALONG_COLUMNS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    IS_NESTED: tl.constexpr,
    VALUES: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    SCALE: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """`WIDTH` outputs from `first_output` on of one expert's matrix times the vector at `x_place`, in fp32.

    The outputs are of one block each where the matrix is stored `(in, out)`.
    """
    output = first_output + tl.arange(0, WIDTH)
    matrix = expert.to(tl.int64) * (ROWS * COLUMNS)
    DTYPE: tl.constexpr = x_place.dtype.element_ty
    ROW_BLOCKS: tl.constexpr = COLUMNS // BLOCKSIZE if BLOCKSIZE > 0 else 0
    NUM_BLOCKS: tl.constexpr = ROWS * ROW_BLOCKS
    if BLOCKSIZE == 0:
        N: tl.constexpr = ROWS if ALONG_COLUMNS else COLUMNS
        K: tl.constexpr = COLUMNS if ALONG_COLUMNS else ROWS
        STRIDE_N: tl.constexpr = COLUMNS if ALONG_COLUMNS else 1
        STRIDE_K: tl.constexpr = 1 if ALONG_COLUMNS else COLUMNS
        acc = tl.zeros((WIDTH, TILE_K), tl.float32)
        for first in range(0, K, TILE_K):
            k = first + tl.arange(0, TILE_K)
            x = tl.load(x_place + k, mask=k < K, other=0.0).to(tl.float32)
            place = W + matrix + output[:, None] * STRIDE_N + k[None, :] * STRIDE_K
            weight = tl.load(place, mask=(output < N)[:, None] & (k < K)[None, :], other=0.0)
            acc += weight.to(DTYPE).to(tl.float32) * x[None, :]
        y = tl.sum(acc, 1)
    elif ALONG_COLUMNS:
        HALF: tl.constexpr = TILE_K // 2
        BLOCKS: tl.constexpr = TILE_K // BLOCKSIZE
        is_output = (output < ROWS)[:, None]
        acc = tl.zeros((WIDTH, HALF), tl.float32)
        for step in range((COLUMNS + TILE_K - 1) // TILE_K):
            byte = step * HALF + tl.arange(0, HALF)
            is_byte = byte < COLUMNS // 2
            even = tl.load(x_place + 2 * byte, mask=is_byte, other=0.0).to(tl.float32)
            odd = tl.load(x_place + 2 * byte + 1, mask=is_byte, other=0.0).to(tl.float32)
            place = W + matrix // 2 + output[:, None] * (COLUMNS // 2) + byte[None, :]
            codes = tl.load(place, mask=is_output & is_byte[None, :], other=0)
            block = step * BLOCKS + tl.arange(0, BLOCKS)
            mask = is_output & (block < ROW_BLOCKS)[None, :]
            block = output[:, None] * ROW_BLOCKS + block[None, :]
            scale = load_scales(ABSMAX, NESTED, OFFSET, MAP, expert, block, mask, NUM_BLOCKS, IS_NESTED)
            high, low = look_up_codes(codes, VALUES, ASSEMBLY, DTYPE)
            part = high.to(tl.float32) * even[None, :] + low.to(tl.float32) * odd[None, :]
            part = tl.reshape(part, (WIDTH, BLOCKS, BLOCKSIZE // 2)) * scale[:, :, None]
            acc += tl.reshape(part, (WIDTH, HALF))
        y = tl.sum(acc, 1) * (1 / SCALE)
    else:
        byte = first_output // 2 + tl.arange(0, WIDTH // 2)
        is_byte = (byte < COLUMNS // 2)[None, :]
        high_sum = tl.zeros((TILE_K, WIDTH // 2), tl.float32)
        low_sum = tl.zeros((TILE_K, WIDTH // 2), tl.float32)
        for first in range(0, ROWS, TILE_K):
            k = first + tl.arange(0, TILE_K)
            x = tl.load(x_place + k, mask=k < ROWS, other=0.0).to(tl.float32)
            place = W + matrix // 2 + k[:, None] * (COLUMNS // 2) + byte[None, :]
            codes = tl.load(place, mask=(k < ROWS)[:, None] & is_byte, other=0)
            block = k * ROW_BLOCKS + first_output // BLOCKSIZE
            scale = load_scales(ABSMAX, NESTED, OFFSET, MAP, expert, block, k < ROWS, NUM_BLOCKS, IS_NESTED)
            high, low = look_up_codes(codes, VALUES, ASSEMBLY, DTYPE)
            x = (x * scale)[:, None]
            high_sum += high.to(tl.float32) * x
            low_sum += low.to(tl.float32) * x
        y = tl.interleave(tl.sum(high_sum, 0), tl.sum(low_sum, 0)) * (1 / SCALE)
    return y


@triton.jit
def _add_low_rank_and_bias(
    y,
    reduced_place,
    B,
    BIAS,
    expert,
    first_output,
    N: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    output = first_output + tl.arange(0, WIDTH)
    is_output = output < N
    if RANK > 0:
        r = tl.arange(0, RANKS)
        reduced = tl.load(reduced_place + r, mask=r < RANK, other=0.0)
        place = B + expert.to(tl.int64) * (N * RANK) + output[:, None] * RANK + r[None, :]
        factor = tl.load(place, mask=is_output[:, None] & (r < RANK)[None, :], other=0.0)
        y += tl.sum(factor.to(reduced.dtype).to(tl.float32) * reduced.to(tl.float32)[None, :], 1)
    if HAS_BIAS:
        y += tl.load(BIAS + expert.to(tl.int64) * N + output, mask=is_output, other=0.0).to(tl.float32)
    return y


@triton.jit(do_not_specialize=["limit", "alpha"])
def _gated_pairs_kernel(
    X,
    IDS,
    W,
    ABSMAX,
    NESTED,
    OFFSET,
    MAP,
    REDUCED,
    B,
    BIAS,
    OUT,
    limit,
    alpha,
    NUM_EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOP_K: tl.constexpr,
    ALONG_COLUMNS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    IS_NESTED: tl.constexpr,
    VALUES: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    SCALE: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KIND: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE_K: tl.constexpr,
):
    pair = tl.program_id(0)
    expert = tl.load(IDS + pair)
    if (expert >= 0) & (expert < NUM_EXPERTS):
        N: tl.constexpr = ROWS if ALONG_COLUMNS else COLUMNS
        K: tl.constexpr = COLUMNS if ALONG_COLUMNS else ROWS
        x_place = X + (pair // TOP_K).to(tl.int64) * K
        reduced_place = REDUCED + pair * RANK
        first = tl.program_id(1) * WIDTH
        if INTERLEAVED:
            both = _outputs(
                x_place, W, ABSMAX, NESTED, OFFSET, MAP, expert, 2 * first, ROWS, COLUMNS, ALONG_COLUMNS,
                BLOCKSIZE, IS_NESTED, VALUES, ASSEMBLY, SCALE, 2 * WIDTH, TILE_K,
            )  # fmt: skip
            both = _add_low_rank_and_bias(
                both, reduced_place, B, BIAS, expert, 2 * first, N, RANK, RANKS, HAS_BIAS, 2 * WIDTH
            )
            gate, up = tl.split(tl.reshape(both, (WIDTH, 2)))
        else:
            gate = _outputs(
                x_place, W, ABSMAX, NESTED, OFFSET, MAP, expert, first, ROWS, COLUMNS, ALONG_COLUMNS,
                BLOCKSIZE, IS_NESTED, VALUES, ASSEMBLY, SCALE, WIDTH, TILE_K,
            )  # fmt: skip
            gate = _add_low_rank_and_bias(gate, reduced_place, B, BIAS, expert, first, N, RANK, RANKS, HAS_BIAS, WIDTH)
            up = _outputs(
                x_place, W, ABSMAX, NESTED, OFFSET, MAP, expert, N // 2 + first, ROWS, COLUMNS, ALONG_COLUMNS,
                BLOCKSIZE, IS_NESTED, VALUES, ASSEMBLY, SCALE, WIDTH, TILE_K,
            )  # fmt: skip
            up = _add_low_rank_and_bias(
                up, reduced_place, B, BIAS, expert, N // 2 + first, N, RANK, RANKS, HAS_BIAS, WIDTH
            )
        feature = first + tl.arange(0, WIDTH)
        value = gate_value(gate, up, limit, alpha, KIND)
        tl.store(OUT + pair.to(tl.int64) * (N // 2) + feature, value.to(OUT.dtype.element_ty), mask=feature < N // 2)


@triton.jit
def _combined_pairs_kernel(
    X,
    IDS,
    WEIGHTS,
    W,
    ABSMAX,
    NESTED,
    OFFSET,
    MAP,
    REDUCED,
    B,
    BIAS,
    OUT,
    NUM_EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOP_K: tl.constexpr,
    ALONG_COLUMNS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    IS_NESTED: tl.constexpr,
    VALUES: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    SCALE: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE_K: tl.constexpr,
):
    N: tl.constexpr = ROWS if ALONG_COLUMNS else COLUMNS
    K: tl.constexpr = COLUMNS if ALONG_COLUMNS else ROWS
    token = tl.program_id(0)
    first = tl.program_id(1) * WIDTH
    total = tl.zeros((WIDTH,), tl.float32)
    for choice in tl.static_range(TOP_K):
        pair = token * TOP_K + choice
        expert = tl.load(IDS + pair)
        if (expert >= 0) & (expert < NUM_EXPERTS):
            y = _outputs(
                X + pair.to(tl.int64) * K, W, ABSMAX, NESTED, OFFSET, MAP, expert, first, ROWS, COLUMNS, ALONG_COLUMNS,
                BLOCKSIZE, IS_NESTED, VALUES, ASSEMBLY, SCALE, WIDTH, TILE_K,
            )  # fmt: skip
            y = _add_low_rank_and_bias(
                y, REDUCED + pair * RANK, B, BIAS, expert, first, N, RANK, RANKS, HAS_BIAS, WIDTH
            )
            total += y * tl.load(WEIGHTS + pair).to(tl.float32)
    output = first + tl.arange(0, WIDTH)
    tl.store(OUT + token.to(tl.int64) * N + output, total.to(OUT.dtype.element_ty), mask=output < N)


def _width_and_step(weight: PackedWeight) -> tuple[int, int]:
    """Outputs of one program, and the step along the contraction: whole blocks, and 16 bytes for each thread."""
    if weight.is_transposed:
        return 32, 64
    return 8, max(weight.blocksize, min(1024, next_power_of_2(weight.in_features)))


def fits_few_rows(up: PackedWeight, down: PackedWeight, gate: Gate) -> bool:
    """Whether the kernels here can compute with these weights."""
    for weight, num_outputs in ((up, 1 if gate.interleaved else 2), (down, 1)):
        if not weight.is_packed:
            continue
        if not weight.blocks_follow_rows or weight.blocksize > LARGEST_BLOCKSIZE:
            return False
        # outputs that share a program share the blocks of stored rows
        width = _width_and_step(weight)[0] * (2 if weight is up and gate.interleaved else 1)
        if weight.is_transposed and (weight.blocksize % width or weight.out_features // num_outputs % width):
            return False
    return True


def _constants(weight: PackedWeight, dtype: torch.dtype) -> dict[str, object]:
    table = CodeTable((), ("", ""), 1.0)
    if weight.is_packed:
        table = code_table(weight.quant_type, dtype, runs_ptx(weight.tensors[0].device))
    return {
        "ALONG_COLUMNS": not weight.is_transposed,
        "BLOCKSIZE": weight.blocksize,
        "IS_NESTED": weight.is_nested,
        "VALUES": table.values,
        "ASSEMBLY": table.assembly,
        "SCALE": table.scale,
    }


def gated_pairs(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    weight: PackedWeight,
    reduced: torch.Tensor | None,
    B: torch.Tensor | None,
    bias: torch.Tensor | None,
    gate: Gate,
) -> torch.Tensor:
    """Projection, low-rank term, bias and gate of each pair: `(P, I)`.

    Args:
        x: `(T, H)`, contiguous.
        top_k_index: `(T, K)` ids, contiguous; rows of pairs outside `[0, E)` are left as they were allocated.
        weight: of the first projection, `2I` outputs.
        reduced: `(P, R)`, see `reduce_pairs`; None without a low-rank term.
        B: `(E, 2I, R)` contiguous, any floating dtype; rounded to that of x.
        bias: `(E, 2I)`, contiguous.
        gate: which.
    """
    num_pairs, features = top_k_index.numel(), weight.out_features // 2
    out = allocate((num_pairs, features), x.dtype, x.device)
    rank = 0 if reduced is None else reduced.shape[1]
    width, tile_k = _width_and_step(weight)
    launch(
        _gated_pairs_kernel,
        (num_pairs, cdiv(features, width)),
        (
            x,
            top_k_index,
            *kernel_tensors(weight),
            x if reduced is None else reduced,
            x if B is None else B,
            x if bias is None else bias,
            out,
        ),
        (gate.limit, gate.alpha),
        NUM_EXPERTS=weight.num_experts,
        ROWS=weight.rows,
        COLUMNS=weight.columns,
        TOP_K=top_k_index.shape[1],
        **_constants(weight, x.dtype),
        RANK=rank,
        RANKS=next_power_of_2(rank),
        HAS_BIAS=bias is not None,
        KIND=gate.kind,
        INTERLEAVED=gate.interleaved,
        WIDTH=width,
        TILE_K=tile_k,
    )
    return out


def combined_pairs(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    weight: PackedWeight,
    reduced: torch.Tensor | None,
    B: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Projection, low-rank term and bias of each pair, weighted and summed in fp32 in the order of K: `(T, H)`.

    Args:
        x: `(P, I)`, contiguous.
        top_k_index: `(T, K)` ids, contiguous; pairs outside `[0, E)` count as zero.
        top_k_weights: `(T, K)`, contiguous.
        weight: of the second projection.
        reduced: `(P, R)`, see `reduce_pairs`; None without a low-rank term.
        B: `(E, H, R)` contiguous, any floating dtype; rounded to that of x.
        bias: `(E, H)`, contiguous.
    """
    num_tokens, top_k = top_k_index.shape
    out = allocate((num_tokens, weight.out_features), x.dtype, x.device)
    rank = 0 if reduced is None else reduced.shape[1]
    width, tile_k = _width_and_step(weight)
    launch(
        _combined_pairs_kernel,
        (num_tokens, cdiv(weight.out_features, width)),
        (
            x,
            top_k_index,
            top_k_weights,
            *kernel_tensors(weight),
            x if reduced is None else reduced,
            x if B is None else B,
            x if bias is None else bias,
            out,
        ),
        (),
        NUM_EXPERTS=weight.num_experts,
        ROWS=weight.rows,
        COLUMNS=weight.columns,
        TOP_K=top_k,
        **_constants(weight, x.dtype),
        RANK=rank,
        RANKS=next_power_of_2(rank),
        HAS_BIAS=bias is not None,
        WIDTH=width,
        TILE_K=tile_k,
    )
    return out
