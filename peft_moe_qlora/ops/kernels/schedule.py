"""Routing on the device: a stable counting sort of the routed pairs by expert, and the tiles of rows that follow."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import cdiv, launch, next_power_of_2
from .launch_recorder import allocate
from .tile_table import Cut, tile_step

MOST_PAIRS_OF_ONE_PROGRAM = 256


class RoutedRows(NamedTuple):
    """The position of each routed pair among the rows sorted by expert; all int32.

    Args:
        ends: `(E,)`, the exclusive end of each expert's rows.
        pair_of_row: `(S,)`, row -> token * K + choice.
        row_of_pair: `(S,)`, the inverse; pairs of experts in other processes have the rows from `ends[-1]` on.
        whole: the tensor of which the three are views, if there is one.
    """

    ends: torch.Tensor
    pair_of_row: torch.Tensor
    row_of_pair: torch.Tensor
    whole: torch.Tensor | None = None


class Tiles(NamedTuple):
    """Runs of rows of one expert, each computed by one program (times the tiles of columns).

    Args:
        tiles: `(3, bound)` int32: expert, first row, and index of the height. After the last tile the expert is -1.
        tile_ends: `(E,)` int32, the sums of the numbers of tiles of the experts; in the order of experts the exclusive
            end of each expert's tiles.
        cut: heights and order.
        whole: the tensor of which the two are views.
    """

    tiles: torch.Tensor
    tile_ends: torch.Tensor
    cut: Cut
    whole: torch.Tensor

    @property
    def bound(self) -> int:
        return self.tiles.shape[1]

    @property
    def heights(self) -> tuple[int, ...]:
        return self.cut.heights


@triton.jit
def _height_index(rows_left, HEIGHTS: tl.constexpr, STEP: tl.constexpr):
    """Index of the height of a tile: the smallest that fits the remaining rows of its expert, or that of `STEP`."""
    height = tl.zeros(rows_left.shape, tl.int32)
    for index in tl.static_range(1, len(HEIGHTS)):
        height = tl.where(rows_left <= HEIGHTS[index], index, height)
    if HEIGHTS[0] > STEP:
        height = tl.where(rows_left > HEIGHTS[0], 1, height)
    return height


@triton.jit
def _num_tiles(num_rows, HEIGHTS: tl.constexpr, STEP: tl.constexpr):
    """Number of tiles of an expert."""
    tiles = (num_rows - HEIGHTS[0] + 2 * STEP - 1) // STEP
    return tl.where(num_rows > 0, tl.maximum(tiles, 1), 0)


@triton.jit
def _load_ids(IDS, pair, num_pairs, NUM_EXPERTS: tl.constexpr):
    """Expert ids; E for pairs that are not computed here, E + 1 after the last pair."""
    ids = tl.load(IDS + pair, mask=pair < num_pairs, other=0)
    # compare before the cast to int32
    ids = tl.where((ids >= 0) & (ids < NUM_EXPERTS), ids, NUM_EXPERTS).to(tl.int32)
    return tl.where(pair < num_pairs, ids, NUM_EXPERTS + 1)


@triton.jit(do_not_specialize=["num_pairs"])
def _count_kernel(IDS, COUNTS, num_pairs, NUM_EXPERTS: tl.constexpr, BUCKETS: tl.constexpr, BLOCK: tl.constexpr):
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ids = _load_ids(IDS, pair, num_pairs, NUM_EXPERTS)
    tl.store(COUNTS + tl.program_id(0) * BUCKETS + tl.arange(0, BUCKETS), tl.histogram(ids, BUCKETS))


@triton.jit(do_not_specialize=["num_programs"])
def _scan_kernel(COUNTS, num_programs, BUCKETS: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr):
    """Replaces the counts of each program by the number of pairs before it, per expert; the totals follow."""
    bucket = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    carried = tl.zeros((GROUP,), tl.int32)
    for first in range(0, num_programs, CHUNK):
        program = first + tl.arange(0, CHUNK)
        place = COUNTS + program[:, None] * BUCKETS + bucket[None, :]
        is_there = (program < num_programs)[:, None]
        counts = tl.load(place, mask=is_there, other=0)
        before = tl.cumsum(counts, 0) - counts + carried[None, :]
        tl.store(place, before, mask=is_there)
        carried += tl.sum(counts, 0)
    tl.store(COUNTS + num_programs * BUCKETS + bucket, carried)


@triton.jit(do_not_specialize=["num_pairs"])
def _place_kernel(
    IDS,
    COUNTS,
    ENDS,
    PAIR_OF_ROW,
    ROW_OF_PAIR,
    num_pairs,
    NUM_EXPERTS: tl.constexpr,
    BUCKETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.arange(0, BLOCK)
    pair = tl.program_id(0) * BLOCK + index
    ids = _load_ids(IDS, pair, num_pairs, NUM_EXPERTS)
    bucket = tl.arange(0, BUCKETS)
    totals = tl.load(COUNTS + tl.num_programs(0) * BUCKETS + bucket)
    ends = tl.cumsum(totals, 0)
    if tl.program_id(0) == 0:
        tl.store(ENDS + bucket, ends, mask=bucket < NUM_EXPERTS)
    starts = ends - totals + tl.load(COUNTS + tl.program_id(0) * BUCKETS + bucket)
    is_before = (ids[None, :] == ids[:, None]) & (index[None, :] < index[:, None])
    row = tl.gather(starts, ids, 0) + tl.sum(is_before.to(tl.int32), 1)
    tl.store(ROW_OF_PAIR + pair, row, mask=pair < num_pairs)
    tl.store(PAIR_OF_ROW + row, pair, mask=pair < num_pairs)


@triton.jit(do_not_specialize=["num_pairs", "bound"])
def _route_few_kernel(
    IDS,
    ENDS,
    PAIR_OF_ROW,
    ROW_OF_PAIR,
    TILES,
    TILE_ENDS,
    num_pairs,
    bound,
    NUM_EXPERTS: tl.constexpr,
    BUCKETS: tl.constexpr,
    BLOCK: tl.constexpr,
    HEIGHTS: tl.constexpr,
    STEP: tl.constexpr,
    BOUND: tl.constexpr,
):
    """Routing in a single launch with one program for all pairs."""
    pair = tl.arange(0, BLOCK)
    ids = _load_ids(IDS, pair, num_pairs, NUM_EXPERTS)
    is_same_before = (ids[None, :] == ids[:, None]) & (pair[None, :] < pair[:, None])
    row = tl.sum(((ids[None, :] < ids[:, None]) | is_same_before).to(tl.int32), 1)
    tl.store(ROW_OF_PAIR + pair, row, mask=pair < num_pairs)
    tl.store(PAIR_OF_ROW + row, pair, mask=pair < num_pairs)
    expert = tl.arange(0, BUCKETS)
    is_expert = expert < NUM_EXPERTS
    counts = tl.histogram(ids, BUCKETS)
    end = tl.cumsum(counts, 0)
    tl.store(ENDS + expert, end, mask=is_expert)
    num_tiles = _num_tiles(tl.where(is_expert, counts, 0), HEIGHTS, STEP)
    tile_end = tl.cumsum(num_tiles, 0)
    tl.store(TILE_ENDS + expert, tile_end, mask=is_expert)
    for number in range(tl.max(num_tiles, 0)):
        tile = tile_end - num_tiles + number
        first = end - counts + number * STEP
        is_tile = number < num_tiles
        tl.store(TILES + tile, expert, mask=is_tile)
        tl.store(TILES + bound + tile, first, mask=is_tile)
        tl.store(TILES + 2 * bound + tile, _height_index(end - first, HEIGHTS, STEP), mask=is_tile)
    tile = tl.arange(0, BOUND)
    tl.store(TILES + tile, tl.full((BOUND,), -1, tl.int32), mask=(tile >= tl.sum(num_tiles, 0)) & (tile < bound))


def _aligned(number: int) -> int:
    """Rounds a number of int32 up to a multiple of 16 bytes, for the start of the next part."""
    return number + -number % 4


def routing_size(num_experts: int, num_pairs: int) -> int:
    return _aligned(num_experts) + _aligned(num_pairs) + num_pairs


def split_routing(ints: torch.Tensor, num_experts: int, num_pairs: int) -> RoutedRows:
    """Views of the parts of the tensor that contains a routing."""
    second, third = _aligned(num_experts), _aligned(num_experts) + _aligned(num_pairs)
    return RoutedRows(ints[:num_experts], ints[second : second + num_pairs], ints[third:], ints)


def _empty_routing(num_experts: int, num_pairs: int, device: torch.device) -> RoutedRows:
    # a single allocation, since callers launch often
    ints = allocate((routing_size(num_experts, num_pairs),), torch.int32, device)
    return split_routing(ints, num_experts, num_pairs)


def _empty_tiles(num_experts: int, num_pairs: int, cut: Cut, device: torch.device) -> Tiles:
    step = tile_step(cut.heights)
    if step not in cut.heights[:2]:
        raise ValueError(f"Found tile heights {cut.heights}. Expected {step} as the first or second one.")
    bound = num_pairs // step + min(num_experts, num_pairs)
    return split_tiles(allocate((_aligned(num_experts) + 3 * bound,), torch.int32, device), num_experts, cut)


def split_tiles(ints: torch.Tensor, num_experts: int, cut: Cut) -> Tiles:
    """Views of the parts of the tensor that contains tiles."""
    return Tiles(ints[_aligned(num_experts) :].view(3, -1), ints[:num_experts], cut, ints)


def route(top_k_index: torch.Tensor, num_experts: int, cut: Cut) -> tuple[RoutedRows, Tiles]:
    """`sort_pairs` and `cut_tiles`, in one launch for few pairs in the order of experts."""
    num_pairs, device = top_k_index.numel(), top_k_index.device
    if num_pairs > MOST_PAIRS_OF_ONE_PROGRAM or cut.highest_first:
        rows = sort_pairs(top_k_index, num_experts)
        return rows, cut_tiles(rows, cut)
    rows = _empty_routing(num_experts, num_pairs, device)
    tiles = _empty_tiles(num_experts, num_pairs, cut, device)
    launch(
        _route_few_kernel,
        (1,),
        (top_k_index, *rows[:3], *tiles[:2]),
        (num_pairs, tiles.bound),
        NUM_EXPERTS=num_experts,
        BUCKETS=next_power_of_2(num_experts + 2),
        BLOCK=max(16, next_power_of_2(num_pairs)),
        HEIGHTS=cut.heights,
        STEP=tile_step(cut.heights),
        BOUND=next_power_of_2(tiles.bound),
    )
    return rows, tiles


def sort_pairs(top_k_index: torch.Tensor, num_experts: int) -> RoutedRows:
    """Sorts the routed pairs by expert with a stable sort.

    Args:
        top_k_index: `(T, K)` integer ids, contiguous; ids outside `[0, num_experts)` come last.
        num_experts: E.
    """
    num_pairs, device = top_k_index.numel(), top_k_index.device
    rows = _empty_routing(num_experts, num_pairs, device)
    buckets = next_power_of_2(num_experts + 2)
    sizes = {"NUM_EXPERTS": num_experts, "BUCKETS": buckets}
    # small blocks: each pair is compared with all pairs of its block
    block = 128
    programs = cdiv(num_pairs, block)
    counts = allocate((programs + 1, buckets), torch.int32, device)
    launch(_count_kernel, (programs,), (top_k_index, counts), (num_pairs,), **sizes, BLOCK=block)
    group, chunk = min(16, buckets), min(512, next_power_of_2(programs))
    launch(_scan_kernel, (buckets // group,), (counts,), (programs,), BUCKETS=buckets, GROUP=group, CHUNK=chunk)
    tensors = (top_k_index, counts, rows.ends, rows.pair_of_row, rows.row_of_pair)
    launch(_place_kernel, (programs,), tensors, (num_pairs,), **sizes, BLOCK=block)
    return rows


@triton.jit(do_not_specialize=["bound"])
def _tiles_kernel(
    ENDS,
    TILES,
    TILE_ENDS,
    bound,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    HEIGHTS: tl.constexpr,
    STEP: tl.constexpr,
    HIGHEST_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    expert = tl.arange(0, EXPERTS)
    is_expert = expert < NUM_EXPERTS
    end = tl.load(ENDS + expert, mask=is_expert, other=0)
    start = tl.load(ENDS + expert - 1, mask=is_expert & (expert > 0), other=0)
    num_tiles = _num_tiles(end - start, HEIGHTS, STEP)
    if tl.program_id(0) == 0:
        tl.store(TILE_ENDS + expert, tl.cumsum(num_tiles, 0), mask=is_expert)
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    height_of_last = _height_index(end - start - (num_tiles - 1) * STEP, HEIGHTS, STEP)
    my_expert = tl.full((BLOCK,), -1, tl.int32)
    first = tile * STEP
    my_end = tl.zeros((BLOCK,), tl.int32)
    num_before = 0
    for choice in tl.static_range(len(HEIGHTS) if HIGHEST_FIRST else 1):
        # tiles of this height, or of all: `count` tiles of each expert, from its tile `skipped` on
        count = num_tiles
        skipped = tl.zeros((EXPERTS,), tl.int32)
        if HIGHEST_FIRST:
            count = ((num_tiles > 0) & (height_of_last == choice)).to(tl.int32)
            if HEIGHTS[choice] == STEP:
                count += tl.maximum(num_tiles - 1, 0)
            else:
                skipped = num_tiles - 1
        tile_start = num_before + tl.cumsum(count, 0) - count
        num_before += tl.sum(count, 0)
        is_mine = (tile[:, None] >= tile_start[None, :]) & (tile[:, None] < (tile_start + count)[None, :])
        # one-hot over experts, all False for other tiles: a sum selects the value of the expert
        my_expert += tl.sum(tl.where(is_mine, expert[None, :] + 1, 0), 1)
        first += tl.sum(tl.where(is_mine, (start + (skipped - tile_start) * STEP)[None, :], 0), 1)
        my_end += tl.sum(tl.where(is_mine, end[None, :], 0), 1)
    left = my_end - first
    is_tile = tile < bound
    tl.store(TILES + tile, my_expert, mask=is_tile)
    tl.store(TILES + bound + tile, first, mask=is_tile)
    tl.store(TILES + 2 * bound + tile, _height_index(left, HEIGHTS, STEP), mask=is_tile)


def cut_tiles(rows: RoutedRows, cut: Cut) -> Tiles:
    """Divides the rows of each expert into tiles."""
    return cut_rows(rows.ends, rows.pair_of_row.shape[0], cut)


def cut_rows(ends: torch.Tensor, num_rows: int, cut: Cut) -> Tiles:
    """`cut_tiles`, from the ends of the experts' rows."""
    num_experts = ends.shape[0]
    tiles = _empty_tiles(num_experts, num_rows, cut, ends.device)
    block = 32
    launch(
        _tiles_kernel,
        (cdiv(tiles.bound, block),),
        (ends, tiles.tiles, tiles.tile_ends),
        (tiles.bound,),
        NUM_EXPERTS=num_experts,
        EXPERTS=next_power_of_2(num_experts),
        HEIGHTS=cut.heights,
        STEP=tile_step(cut.heights),
        HIGHEST_FIRST=cut.highest_first,
        BLOCK=block,
    )
    return tiles


@triton.jit
def part_of_tile(TILES, ENDS, bound, PART: tl.constexpr, HEIGHT: tl.constexpr, STEP: tl.constexpr):
    """Expert, first row, rows, a mask of valid rows, and whether any is valid, for `PART` rows of a tile.

    `HEIGHT` is that of the highest tile, `STEP` their `tile_step`.
    """
    PARTS: tl.constexpr = (HEIGHT + PART - 1) // PART
    tile = tl.program_id(0) // PARTS
    expert = tl.load(TILES + tile)
    start = tl.load(TILES + bound + tile)
    end = tl.load(ENDS + expert, mask=expert >= 0, other=0)
    end = tl.where(end - start > HEIGHT, start + STEP, end)
    start += (tl.program_id(0) % PARTS) * PART
    row = start + tl.arange(0, PART)
    return expert, start, row, row < end, (expert >= 0) & (start < end)
