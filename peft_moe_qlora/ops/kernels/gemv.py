"""Forward of the layer for few tokens, as in generation: one matrix-vector product per routed pair instead of tiles.

Nothing is sorted, and no tile is padded with missing rows. An expert chosen by several tokens is decoded for each of
them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..operands import Gate, PackedWeight
from .codec import codec_of
from .decode import block_scales, kernel_tensors
from .gate import gate_value
from .launch import cdiv, launch, next_power_of_2
from .launch_recorder import allocate

LARGEST_BLOCKSIZE = 512
"""Limit on the block size, since a step consists of whole blocks and must fit into registers."""


@triton.jit(do_not_specialize=["scaling"])
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
            # rounded like the operands of the matrix instructions on the other path
            acc += factor.to(x.dtype).to(tl.float32) * x.to(tl.float32)[None, :]
        tl.store(OUT + pair * RANK + r, (tl.sum(acc, 1) * scaling).to(OUT.dtype.element_ty), mask=r < RANK)


def reduce_pairs(
    x: torch.Tensor, top_k_index: torch.Tensor, A: torch.Tensor, scaling: float, top_k: int
) -> torch.Tensor:
    """`scaling * A[expert of p] @ x[p // top_k]` for each pair p: `(P, R)` in the dtype of x.

    Args:
        x: `(T, K)`, or `(P, K)` with `top_k` 1; contiguous.
        top_k_index: `(T, K)` ids, contiguous; rows of pairs outside `[0, E)` are not written.
        A: `(E, R, K)` contiguous, in any floating-point dtype; rounded to the dtype of x.
        scaling: factor of the product.
        top_k: number of pairs per row of x.
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
def _no_sums(CODEC: tl.constexpr, WIDTH: tl.constexpr, TILE_K: tl.constexpr):
    """Zeros for `_add_products`, which accumulates elementwise; the contraction is reduced once, at the end."""
    return tl.zeros((WIDTH, TILE_K // 2 if CODEC.is_packed else TILE_K), tl.float32)


@triton.jit
def _add_products(
    sums,
    x_place,
    weight,
    W,
    ABSMAX,
    NESTED,
    OFFSET,
    MAP,
    expert,
    first_output,
    N: tl.constexpr,
    K: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,
    IS_NESTED: tl.constexpr,
    CODEC: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Adds `weight` times the products of one expert's matrix and the vector at `x_place`, in fp32.

    For `WIDTH` outputs starting at `first_output`.
    """
    output = first_output + tl.arange(0, WIDTH)
    is_output = (output < N)[:, None]
    matrix = expert.to(tl.int64) * (N * K)
    DTYPE: tl.constexpr = x_place.dtype.element_ty
    for first in range(0, K, TILE_K):
        k = first + tl.arange(0, TILE_K)
        x = tl.load(x_place + k, mask=k < K, other=0.0)
        if not CODEC.is_packed:
            STRIDE_N: tl.constexpr = 1 if IS_TRANSPOSED else K
            STRIDE_K: tl.constexpr = N if IS_TRANSPOSED else 1
            place = W + matrix + output[:, None] * STRIDE_N + k[None, :] * STRIDE_K
            w = tl.load(place, mask=is_output & (k < K)[None, :], other=0.0)
            sums += w.to(DTYPE).to(tl.float32) * (x.to(tl.float32) * weight)[None, :]
        else:
            BLOCK_COLUMNS: tl.constexpr = CODEC.block_columns
            BLOCK: tl.constexpr = min(BLOCK_COLUMNS, TILE_K)
            BLOCKS: tl.constexpr = TILE_K // BLOCK
            UNIT: tl.constexpr = CODEC.unit
            pair = first // 2 + tl.arange(0, TILE_K // 2)
            place = W + matrix // 2 + output[:, None] * (K // 2) + pair[None, :]
            codes = tl.load(place, mask=is_output & (pair < K // 2)[None, :], other=0)
            block = first // BLOCK_COLUMNS + tl.arange(0, BLOCKS)
            scale = block_scales(ABSMAX, NESTED, OFFSET, MAP, expert, output, block, N, K, IS_NESTED, CODEC)
            left, right = CODEC.look_up(codes, CODEC, DTYPE)
            even, odd = tl.split(tl.reshape(x, (TILE_K // 2, 2)))
            part = (
                left.to(tl.float32) * even.to(tl.float32)[None, :] + right.to(tl.float32) * odd.to(tl.float32)[None, :]
            )
            part = tl.reshape(part, (WIDTH, BLOCKS, BLOCK // 2)) * (scale * (weight / UNIT))[:, :, None]
            sums += tl.reshape(part, (WIDTH, TILE_K // 2))
    return sums


@triton.jit
def _low_rank_products(
    reduced_place,
    B,
    expert,
    first_output,
    N: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """`(WIDTH, RANKS)` in fp32, to be summed over the ranks."""
    output = first_output + tl.arange(0, WIDTH)
    r = tl.arange(0, RANKS)
    reduced = tl.load(reduced_place + r, mask=r < RANK, other=0.0)
    place = B + expert.to(tl.int64) * (N * RANK) + output[:, None] * RANK + r[None, :]
    factor = tl.load(place, mask=(output < N)[:, None] & (r < RANK)[None, :], other=0.0)
    return factor.to(reduced.dtype).to(tl.float32) * reduced.to(tl.float32)[None, :]


@triton.jit
def _load_bias(BIAS, expert, first_output, N: tl.constexpr, WIDTH: tl.constexpr):
    output = first_output + tl.arange(0, WIDTH)
    return tl.load(BIAS + expert.to(tl.int64) * N + output, mask=output < N, other=0.0).to(tl.float32)


@triton.jit
def _outputs_of_pair(
    x_place,
    W,
    ABSMAX,
    NESTED,
    OFFSET,
    MAP,
    reduced_place,
    B,
    BIAS,
    expert,
    first_output,
    N: tl.constexpr,
    K: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,
    IS_NESTED: tl.constexpr,
    CODEC: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE_K: tl.constexpr,
):
    sums = _add_products(
        _no_sums(CODEC, WIDTH, TILE_K),
        x_place, 1.0, W, ABSMAX, NESTED, OFFSET, MAP, expert, first_output, N, K, IS_TRANSPOSED,
        IS_NESTED, CODEC, WIDTH, TILE_K,
    )  # fmt: skip
    y = tl.sum(sums, 1)
    if RANK > 0:
        y += tl.sum(_low_rank_products(reduced_place, B, expert, first_output, N, RANK, RANKS, WIDTH), 1)
    if HAS_BIAS:
        y += _load_bias(BIAS, expert, first_output, N, WIDTH)
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
    TOP_K: tl.constexpr,
    KIND: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,
    IS_NESTED: tl.constexpr,
    CODEC: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE_K: tl.constexpr,
):
    pair = tl.program_id(0)
    expert = tl.load(IDS + pair)
    if (expert >= 0) & (expert < NUM_EXPERTS):
        x_place = X + (pair // TOP_K).to(tl.int64) * K
        reduced_place = REDUCED + pair * RANK
        first = tl.program_id(1) * WIDTH
        if INTERLEAVED:
            both = _outputs_of_pair(
                x_place, W, ABSMAX, NESTED, OFFSET, MAP, reduced_place, B, BIAS, expert, 2 * first,
                N, K, IS_TRANSPOSED, IS_NESTED, CODEC,
                RANK, RANKS, HAS_BIAS, 2 * WIDTH, TILE_K,
            )  # fmt: skip
            gate, up = tl.split(tl.reshape(both, (WIDTH, 2)))
        else:
            gate = _outputs_of_pair(
                x_place, W, ABSMAX, NESTED, OFFSET, MAP, reduced_place, B, BIAS, expert, first,
                N, K, IS_TRANSPOSED, IS_NESTED, CODEC,
                RANK, RANKS, HAS_BIAS, WIDTH, TILE_K,
            )  # fmt: skip
            up = _outputs_of_pair(
                x_place, W, ABSMAX, NESTED, OFFSET, MAP, reduced_place, B, BIAS, expert, N // 2 + first,
                N, K, IS_TRANSPOSED, IS_NESTED, CODEC,
                RANK, RANKS, HAS_BIAS, WIDTH, TILE_K,
            )  # fmt: skip
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
    TOP_K: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,
    IS_NESTED: tl.constexpr,
    CODEC: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE_K: tl.constexpr,
):
    token = tl.program_id(0)
    first = tl.program_id(1) * WIDTH
    sums = _no_sums(CODEC, WIDTH, TILE_K)
    low_rank = tl.zeros((WIDTH, RANKS), tl.float32)
    total = tl.zeros((WIDTH,), tl.float32)
    for choice in tl.static_range(TOP_K):
        pair = token * TOP_K + choice
        expert = tl.load(IDS + pair)
        if (expert >= 0) & (expert < NUM_EXPERTS):
            weight = tl.load(WEIGHTS + pair).to(tl.float32)
            sums = _add_products(
                sums, X + pair.to(tl.int64) * K, weight, W, ABSMAX, NESTED, OFFSET, MAP, expert, first,
                N, K, IS_TRANSPOSED, IS_NESTED, CODEC, WIDTH, TILE_K,
            )  # fmt: skip
            if RANK > 0:
                products = _low_rank_products(REDUCED + pair * RANK, B, expert, first, N, RANK, RANKS, WIDTH)
                low_rank += weight * products
            if HAS_BIAS:
                total += weight * _load_bias(BIAS, expert, first, N, WIDTH)
    total += tl.sum(sums, 1)
    if RANK > 0:
        total += tl.sum(low_rank, 1)
    output = first + tl.arange(0, WIDTH)
    tl.store(OUT + token.to(tl.int64) * N + output, total.to(OUT.dtype.element_ty), mask=output < N)


WIDTH = 8
"""Outputs of one program; measured on an H200."""


def _step(weight: PackedWeight) -> int:
    """Step along the contraction: whole blocks, or a part of a block that spans the row."""
    most = 2048 if weight.is_packed else 1024
    step = min(most, next_power_of_2(weight.in_features))
    block = weight.tile_block[1] if weight.is_packed else 0
    return max(block, step) if block <= LARGEST_BLOCKSIZE else step


def fits_gemv(*weights: PackedWeight) -> bool:
    """Whether the kernels here support these weights and are faster.

    Blocks of packed weights must run along the contraction: along the outputs, a program would read a few bytes of
    each row, which measured slower than sorting.
    """
    return all(
        not weight.is_packed or (weight.tile_block is not None and not weight.is_transposed and _fits_step(weight))
        for weight in weights
    )


def _fits_step(weight: PackedWeight) -> bool:
    block = weight.tile_block[1]
    return block <= LARGEST_BLOCKSIZE or block >= weight.in_features


def _tensors(
    x: torch.Tensor,
    weight: PackedWeight,
    reduced: torch.Tensor | None,
    B: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Tensors of one projection, in the order of both kernels' parameters; x is the placeholder for absent ones."""
    return (*kernel_tensors(weight), *[x if tensor is None else tensor for tensor in (reduced, B, bias)])


def _constants(
    weight: PackedWeight, dtype: torch.dtype, reduced: torch.Tensor | None, bias: torch.Tensor | None
) -> dict[str, object]:
    """Constants of one projection, the last parameters of both kernels."""
    rank = 0 if reduced is None else reduced.shape[1]
    return {
        "N": weight.out_features,
        "K": weight.in_features,
        "IS_TRANSPOSED": weight.is_transposed,
        "IS_NESTED": weight.is_nested,
        "CODEC": codec_of(weight, dtype),
        "RANK": rank,
        "RANKS": next_power_of_2(rank),
        "HAS_BIAS": bias is not None,
        "WIDTH": WIDTH,
        "TILE_K": _step(weight),
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
        top_k_index: `(T, K)` ids, contiguous; rows of pairs outside `[0, E)` are not written.
        weight: weight of the first projection, with `2I` outputs.
        reduced: `(P, R)`, see `reduce_pairs`; None without a low-rank term.
        B: `(E, 2I, R)` contiguous, in any floating-point dtype; rounded to the dtype of x.
        bias: `(E, 2I)`, contiguous.
        gate: the gate.
    """
    num_pairs, features = top_k_index.numel(), weight.out_features // 2
    out = allocate((num_pairs, features), x.dtype, x.device)
    launch(
        _gated_pairs_kernel,
        (num_pairs, cdiv(features, WIDTH)),
        (x, top_k_index, *_tensors(x, weight, reduced, B, bias), out),
        (gate.limit, gate.alpha),
        NUM_EXPERTS=weight.num_experts,
        TOP_K=top_k_index.shape[1],
        KIND=gate.kind,
        INTERLEAVED=gate.interleaved,
        **_constants(weight, x.dtype, reduced, bias),
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
        weight: weight of the second projection.
        reduced: `(P, R)`, see `reduce_pairs`; None without a low-rank term.
        B: `(E, H, R)` contiguous, in any floating-point dtype; rounded to the dtype of x.
        bias: `(E, H)`, contiguous.
    """
    num_tokens, top_k = top_k_index.shape
    out = allocate((num_tokens, weight.out_features), x.dtype, x.device)
    launch(
        _combined_pairs_kernel,
        (num_tokens, cdiv(weight.out_features, WIDTH)),
        (x, top_k_index, top_k_weights, *_tensors(x, weight, reduced, B, bias), out),
        (),
        NUM_EXPERTS=weight.num_experts,
        TOP_K=top_k,
        **_constants(weight, x.dtype, reduced, bias),
    )
    return out
