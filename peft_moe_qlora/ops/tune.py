"""Measures the fastest tiles for the products of an experts layer on this GPU.

All candidates compute the same product with a low-rank term. Candidates that do not fit on the GPU are skipped;
different results are an error. `benchmarks/tune.py` creates the package's tables, and `peft-moe-qlora tune` those of a
user.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from triton.runtime.errors import OutOfResources

from ..quantization import DenseStack, Format, QuantizedStack, Stack
from .kernels.gemm_operands import LowRankTerm, Rows
from .kernels.grouped_gemm import WORKSPACE_BYTES, grouped_gemm
from .kernels.schedule import cut_tiles, sort_pairs
from .kernels.specialized_support import supports_specialized
from .kernels.tuning import GemmTiles
from .layer_shape import LayerShape
from .operands import packed_weight, why_not_read_as

LARGEST_ERROR = 6e-3
WORTH_A_WORKSPACE = 0.05
"""Minimum relative speedup for which decoding before the product is chosen."""
HOLDS_BELOW = 4
"""The entry with the fewest measured rows applies down to these rows divided by this number."""
STACK_BYTES = 2**31
"""Limit on the measured experts in bytes of 16-bit weights; more experts only increase the time."""
TWINS = 4
"""Number of distinct experts in a measured stack; quantizing more would take longer than the measurement."""

Timer = Callable[[Callable[[], object]], float]


class Product(NamedTuple):
    """One of the four products of a layer.

    Args:
        n: columns of the result.
        k: length of the contraction.
        along: whether the contraction is along the stored `"columns"` or `"rows"`.
        is_gathered: whether rows are gathered from tokens.
    """

    n: int
    k: int
    along: str
    is_gathered: bool


def products_of(shape: LayerShape, storage: Format | None) -> list[Product]:
    """Products of both projections of a layer, forward and backward, in this order."""
    is_transposed = shape.is_transposed and not (storage is not None and storage.is_out_in)
    found = []
    up = (shape.hidden, (1 + shape.has_gate) * shape.intermediate)
    for for_input_gradient in (False, True):
        along = "columns" if is_transposed == for_input_gradient else "rows"
        for is_up, (in_features, out_features) in ((True, up), (False, (shape.intermediate, shape.hidden))):
            n, k = (in_features, out_features) if for_input_gradient else (out_features, in_features)
            found.append(Product(n, k, along, is_up != for_input_gradient))
    return found


def candidates(rows_per_expert: float, thorough: bool = False, may_specialize: bool = False) -> list[GemmTiles]:
    """Candidate tiles, with decoding inside and before the product.

    Args:
        rows_per_expert: mean number of rows.
        thorough: return more candidates, for the tables of the package.
        may_specialize: return candidates for the kernel with specialized warps, too.
    """
    shapes: Iterable[tuple]
    if rows_per_expert <= 2:
        widths, stages = ((32, 64, 128), (3, 5)) if thorough else ((64, 128), (3,))
        shapes = itertools.product([(16,)], widths, (64, 128), (4,), stages)
    elif rows_per_expert <= 16:
        heights, stages = ([(16,), (32, 16)], (3, 4)) if thorough else ([(16,)], (3,))
        shapes = itertools.product(heights, (64, 128), (64, 128), (4,), stages)
    elif rows_per_expert <= 64:
        heights, stages = ([(32, 16), (64, 32, 16)], (3, 4)) if thorough else ([(64, 32, 16)], (3,))
        shapes = itertools.product(heights, (64, 128), (64,), (4,), stages)
    else:
        large = [((128, 64, 32), 128, 4), ((128, 64, 32), 128, 8), ((128, 64, 32), 256, 8)]
        shapes = [(heights, n, 64, warps, stages) for (heights, n, warps), stages in itertools.product(large, (3, 4))]
        if thorough:
            shapes += [((256, 128, 32), 128, 64, 8, stages) for stages in (3, 4)]
        # shapes that fit into the shared memory of smaller GPUs
        shapes += [((64, 32, 16), 128, 64, 4, 3), ((128, 64, 32), 128, 32, 8, 3), ((64, 32, 16), 128, 32, 4, 4)]
    found = []
    for heights, tile_n, tile_k, num_warps, num_stages in shapes:
        for weight_left, decode_first in itertools.product((False, True), (False, True)):
            if decode_first and (rows_per_expert < 64 or (weight_left and not thorough)):
                continue
            if not decode_first and tile_n == 256 and not thorough:
                continue  # the decoded tile and the accumulator do not both fit into registers
            found.append(GemmTiles(heights, tile_n, tile_k, num_warps, num_stages, weight_left, decode_first))
    if may_specialize and rows_per_expert >= 64:
        for heights, stages in (((256, 128, 32), 4), ((160, 128, 32), 4), ((128, 32), 8)):
            found.append(
                GemmTiles(heights, 128, 64, 8, stages, weight_left=True, decode_first=False, specialized=True)
            )
    return found


def kind_of(storage: Format | None, product: Product) -> str:
    """Name of the weight of a product in tables: its codes, or `dense` if it is always decoded first."""
    rows, columns = (product.n, product.k) if product.along == "columns" else (product.k, product.n)
    if storage is None or storage.tile_block(rows, columns) is None:
        return "dense"
    return storage.kernel_codes


class Problem:
    """A product with random inputs, for the measurement of candidates.

    Args:
        product: the product.
        experts: number of experts, E.
        top_k: number of experts per token, K.
        rows_per_expert: mean number of rows.
        storage: format of the weights; None for 16 bits.
        rank: rank of the low-rank term.
        dtype: dtype of the activations.
        device: device of the product.
    """

    def __init__(
        self,
        product: Product,
        experts: int,
        top_k: int,
        rows_per_expert: float,
        storage: Format | None,
        rank: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cuda",
    ) -> None:
        torch.manual_seed(0)
        n, k = product.n, product.k
        self.for_input_gradient = product.along == "rows"
        num_tokens = max(1, round(rows_per_expert * experts / top_k))
        shape = (experts, k, n) if self.for_input_gradient else (experts, n, k)
        self.weight = packed_weight(_random_stack(shape, storage, dtype, device))
        scores = torch.rand(num_tokens, experts, device=device)
        self.rows = sort_pairs(scores.topk(min(top_k, experts)).indices, experts)
        num_pairs = self.rows.pair_of_row.shape[0]
        if product.is_gathered:
            tokens = torch.randn(num_tokens, k, device=device).to(dtype)
            self.left = Rows(tokens, self.rows.pair_of_row, num_pairs // num_tokens)
        else:
            self.left = Rows(torch.randn(num_pairs, k, device=device).to(dtype))
        self.term = None
        if rank:
            reduced = torch.randn(num_pairs, rank, device=device).to(dtype)
            factor = torch.randn(experts, rank, n, device=device) * 0.02
            # B in the forward, A transposed in the backward
            factor = factor.transpose(1, 2) if self.for_input_gradient else factor.view(experts, n, rank)
            self.term = LowRankTerm(reduced, factor)

    def run(self, tuned: GemmTiles) -> torch.Tensor:
        tiles = cut_tiles(self.rows, tuned.cut)
        return grouped_gemm(self.left, self.weight, self.for_input_gradient, self.rows.ends, tiles, tuned, self.term)


def _random_stack(
    shape: tuple[int, int, int], storage: Format | None, dtype: torch.dtype, device: torch.device | str
) -> Stack:
    some = torch.randn(min(TWINS, shape[0]), *shape[1:], device=device).to(dtype) * 0.02
    if storage is None:
        weight = torch.empty(shape, dtype=dtype, device=device)
        for expert in range(shape[0]):
            weight[expert] = some[expert % len(some)]
        return DenseStack(weight, False)
    stack = QuantizedStack(torch.Size(shape), dtype, False, storage, device)
    for expert, matrix in enumerate(some):
        stack.set_expert(expert, matrix)
    for tensor in stack.parameters():
        for expert in range(len(some), shape[0]):
            tensor.data[expert] = tensor.data[expert % len(some)]
    return stack


def graph_milliseconds(run: Callable[[], object], repeats: int = 9) -> float:
    """Median device time of the replay of a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def time_all(problem: Problem, tried: Sequence[GemmTiles], timer: Timer) -> list[tuple[float, GemmTiles]]:
    """Milliseconds of each candidate that fits on the GPU, fastest first.

    Raises:
        ValueError: results differ from those of the first candidate, or between two runs.
    """
    reference, timed = None, []
    num_rows = int(problem.rows.ends[-1])
    for tiles in tried:
        try:
            out = problem.run(tiles)[:num_rows]
        except OutOfResources:
            continue
        reference = out if reference is None else reference
        error = ((out - reference).float().norm() / reference.float().norm()).item()
        if not error <= LARGEST_ERROR:
            raise ValueError(f"The results of {tiles} differ from those of {tried[0]} by {error:.1e}.")
        timed.append((timer(partial(problem.run, tiles)), tiles))
        if not torch.equal(out, problem.run(tiles)[:num_rows]):
            raise ValueError(f"The results of {tiles} are not reproducible bit for bit.")
    # a workspace must be worth its memory
    return sorted(timed, key=lambda pair: pair[0] * (1 + WORTH_A_WORKSPACE * pair[1].decode_first))


class Job(NamedTuple):
    """Arguments of `compile_share` for one candidate."""

    product: Product
    experts: int
    top_k: int
    storage: Format | None
    rank: int
    tiles: GemmTiles


def compile_share(jobs: Sequence[Job], share: tuple[int, int]) -> None:
    """Compiles the share of one process of the candidates into Triton's on-disk cache."""
    number, of = share
    problems: dict[tuple, Problem] = {}
    for job in jobs[number::of]:
        if job[:-1] not in problems:
            problems.clear()
            rows_per_expert = 16 / job.experts
            problems[job[:-1]] = Problem(job.product, job.experts, job.top_k, rows_per_expert, job.storage, job.rank)
        try:
            problems[job[:-1]].run(job.tiles)
            torch.cuda.synchronize()
        except OutOfResources:
            continue  # `time_all` skips it too


def compile_all(jobs: Sequence[Job], workers: int) -> None:
    """Compiles in parallel processes, since compilation takes most of the time."""
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(workers, len(jobs)))
    with context.Pool(workers) as pool:
        parts = [(number, workers) for number in range(workers)]
        list(pool.imap_unordered(partial(compile_share, list(jobs)), parts))


def measured_experts(shape: LayerShape, product: Product) -> int:
    """Number of experts in a measured product."""
    return max(1, min(shape.experts, STACK_BYTES // (2 * product.n * product.k)))


def _fewest_experts(shape: LayerShape, product: Product) -> int:
    """Smallest number of experts with the same code as for all: they fit into the workspace if and only if all do."""
    return min(measured_experts(shape, product), WORKSPACE_BYTES // (2 * product.n * product.k) + 1)


def measure_layer(
    shape: LayerShape,
    storage: Format | None,
    rank: int = 16,
    rows: Sequence[float] = (),
    workers: int | None = None,
    thorough: bool = False,
    timer: Timer = graph_milliseconds,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
) -> list[dict[str, Any]]:
    """Measures a layer; returns JSON entries with the best tiles for each product and number of rows.

    Where the kernel with specialized warps is best, another entry has the best of the other tiles, for products that
    it does not support.

    Args:
        shape: sizes of the layer.
        storage: format of the weights; None for 16 bits.
        rank: rank of the low-rank terms.
        rows: numbers of rows per expert; default: `LayerShape.default_rows`.
        workers: number of compilation processes; 0 to compile in this process.
        thorough: try more candidates.
        timer: function that returns the milliseconds of a call.
        dtype: dtype of the activations.
        device: device of the measurement.

    Raises:
        ValueError: the kernels do not support the format, or results of candidates differ.
    """
    rows = sorted(set(rows or shape.default_rows()))
    wanted = list(dict.fromkeys(products_of(shape, storage)))
    for product in wanted:
        stored = (product.n, product.k) if product.along == "columns" else (product.k, product.n)
        reason = None if storage is None else why_not_read_as(storage, *stored)
        if reason is not None:
            raise ValueError(f"A product of {product.n} x {product.k} in {storage} cannot be measured: {reason}.")
    device = torch.device(device)
    workers = min(8, os.cpu_count() or 1) if workers is None else workers

    def tried(product: Product, number: float) -> list[GemmTiles]:
        kind = kind_of(storage, product)
        if kind == "dense":
            return [tiles for tiles in candidates(number, thorough) if not tiles.decode_first]
        return candidates(number, thorough, supports_specialized(device, dtype, kind, product.n, product.k, rank))

    if workers:
        # sorted by product, so that a process creates the inputs of a product once
        jobs = [
            Job(product, _fewest_experts(shape, product), shape.top_k, _stored_as(storage, product), rank, tiles)
            for product in wanted
            for tiles in dict.fromkeys(tiles for number in rows for tiles in tried(product, number))
        ]
        compile_all(jobs, workers)
    entries = []
    steps = [(product, number) for product in wanted for number in rows]
    for product, number in tqdm(steps, unit="product", desc="measuring"):
        kind = kind_of(storage, product)
        experts = measured_experts(shape, product)
        problem = Problem(product, experts, shape.top_k, number, _stored_as(storage, product), rank, dtype, device)
        timed = time_all(problem, tried(product, number), timer)
        if not timed:
            raise ValueError(f"None of the candidates for {number:g} rows per expert fits on {device}.")
        others = [pair for pair in timed if not pair[1].specialized]
        for ranking in (timed, others) if timed[0][1].specialized and others else (timed,):
            best, tiles = ranking[0]
            entries.append(
                {
                    "weight": kind,
                    "along": product.along,
                    "n": product.n,
                    "k": product.k,
                    "rows_per_expert": number,
                    "tiles": asdict(tiles),
                    "milliseconds": round(best, 4),
                    "runner_up_milliseconds": round(ranking[min(1, len(ranking) - 1)][0], 4),
                }
            )
        del problem
    return with_bounds(entries)


def _stored_as(storage: Format | None, product: Product) -> Format | None:
    return None if kind_of(storage, product) == "dense" else storage


def with_bounds(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Replaces each measured number of rows by the range of rows to which the entry applies."""
    bounded = []
    for entry in entries:
        number = entry["rows_per_expert"]
        measured = sorted({other["rows_per_expert"] for other in entries if _is_same(entry, other)})
        place = measured.index(number)
        # the first one applies to some more rows, the last one to all
        bounds = [measured[0] / HOLDS_BELOW, *(math.sqrt(a * b) for a, b in itertools.pairwise(measured)), None]
        bounded.append(
            {
                **entry,
                "measured_at": number,
                "from_rows_per_expert": bounds[place],
                "rows_per_expert": bounds[place + 1],
            }
        )
    return bounded


def _is_same(entry: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(entry.get(name) == other.get(name) for name in ("weight", "along", "n", "k"))


def today() -> str:
    return time.strftime("%Y-%m-%d")
