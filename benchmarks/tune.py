"""Measures which tiles are fastest for each product on this GPU, and writes the table that the package chooses from.

    python benchmarks/tune.py --output peft_moe_qlora/ops/kernels/tables/sm90.json

For each number of rows per expert, kind of weight and direction, every candidate computes the same product on fresh
random inputs, with a low-rank term of rank 16; what is slower or wrong is dropped. An entry holds up to the geometric
mean of its number of rows and the next.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm
from triton.runtime.errors import OutOfResources

from peft_moe_qlora.ops import Factors, Gate, packed_weight
from peft_moe_qlora.ops.fused_steps import experts_forward, experts_forward_gemv
from peft_moe_qlora.ops.kernels.grouped_gemm import LowRankTerm, Rows, grouped_gemm
from peft_moe_qlora.ops.kernels.schedule import cut_tiles, sort_pairs
from peft_moe_qlora.ops.kernels.tuning import GemmTiles
from peft_moe_qlora.ops.operands import PackedWeight
from peft_moe_qlora.quantization import DenseStack, FourBitFormat, QuantizedStack
from peft_moe_qlora.quantization.formats import Fp8Format, Mxfp4Format

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, RANK = 128, 2048, 768, 8, 16
TOKENS = (1, 16, 128, 512, 1024, 2048, 4096, 8192, 16384)
WEIGHTS = {"packed": FourBitFormat(), "e4m3": Fp8Format(), "e2m1": Mxfp4Format(), "dense": None}
"""Kind of weight in the table -> format that stands for it."""
LARGEST_ERROR = 6e-3
WORTH_A_WORKSPACE = 0.05
"""Decoding beforehand is chosen where it is faster by this share."""


def candidates(rows_per_expert: float) -> list[GemmTiles]:
    """The tiles worth trying; in and before the product are both among them."""
    if rows_per_expert <= 2:
        shapes = itertools.product([(16,)], (32, 64, 128), (64, 128), (4,), (3, 5))
    elif rows_per_expert <= 16:
        shapes = itertools.product([(16,), (32, 16)], (64, 128), (64, 128), (4,), (3, 4))
    elif rows_per_expert <= 64:
        shapes = itertools.product([(32, 16), (64, 32, 16)], (64, 128), (64,), (4,), (3, 4))
    else:
        large = [((128, 64, 32), 128, 4), ((128, 64, 32), 128, 8), ((128, 64, 32), 256, 8), ((256, 128, 32), 128, 8)]
        shapes = [(heights, n, 64, warps, stages) for (heights, n, warps), stages in itertools.product(large, (3, 4))]
    found = []
    for heights, tile_n, tile_k, num_warps, num_stages in shapes:
        for weight_left, decode_first in itertools.product((False, True), (False, True)):
            if decode_first and rows_per_expert < 64:
                continue
            found.append(GemmTiles(heights, tile_n, tile_k, num_warps, num_stages, weight_left, decode_first))
    return found


class Problem:
    """One product of the yardstick layer.

    Args:
        weight: one of `WEIGHTS`.
        along: whether the contraction runs along the stored `"columns"` or `"rows"`.
        tokens: T.
    """

    def __init__(self, weight: str, along: str, tokens: int) -> None:
        torch.manual_seed(0)
        self.for_input_gradient = along == "rows"
        self.parts = []
        for n, k, is_gathered in ((2 * INTERMEDIATE, HIDDEN, True), (HIDDEN, INTERMEDIATE, False)):
            dense = torch.randn(EXPERTS, n, k, device="cuda", dtype=torch.bfloat16) * 0.02
            stack = DenseStack(dense, False)
            if WEIGHTS[weight] is not None:
                stack = QuantizedStack.from_dense(dense, False, WEIGHTS[weight])
            scores = torch.rand(tokens, EXPERTS, device="cuda")
            rows = sort_pairs(scores.topk(TOP_K).indices, EXPERTS)
            wide, narrow = (n, k) if self.for_input_gradient else (k, n)
            is_gathered ^= self.for_input_gradient
            if is_gathered:
                left = Rows(torch.randn(tokens, wide, device="cuda").bfloat16(), rows.pair_of_row, TOP_K)
            else:
                left = Rows(torch.randn(tokens * TOP_K, wide, device="cuda").bfloat16())
            reduced = torch.randn(tokens * TOP_K, RANK, device="cuda").bfloat16()
            term = LowRankTerm(reduced, torch.randn(EXPERTS, narrow, RANK, device="cuda") * 0.02)
            self.parts.append((left, packed_weight(stack), rows, term))

    def run(self, tuned: GemmTiles) -> list[torch.Tensor]:
        return [self.product(part, tuned) for part in self.parts]

    def product(self, part: tuple[Rows, PackedWeight, object, LowRankTerm], tuned: GemmTiles) -> torch.Tensor:
        left, weight, rows, term = part
        tiles = cut_tiles(rows, tuned.heights)
        return grouped_gemm(left, weight, self.for_input_gradient, rows.ends, tiles, tuned, term)


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Median device time of a CUDA graph's replay."""
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


def compile_share(weights: list[str], share: tuple[int, int]) -> None:
    """Compiles every so-many-th candidate into Triton's cache on disk."""
    number, of = share
    jobs = [
        (weight, along, tiles)
        for weight in weights
        for along in ("columns", "rows")
        for tiles in dict.fromkeys(tiles for tokens in TOKENS for tiles in candidates(tokens * TOP_K / EXPERTS))
    ]
    problems = {}
    for weight, along, tiles in jobs[number::of]:
        if weight == "dense" and tiles.decode_first:
            continue
        if (weight, along) not in problems:
            problems[weight, along] = Problem(weight, along, 16)
        try:
            problems[weight, along].run(tiles)
            torch.cuda.synchronize()
        except OutOfResources as error:
            print(f"{weight} {along} {tiles}: {type(error).__name__}")


def time_all(problem: Problem, tried: list[GemmTiles], repeats: int) -> list[tuple[float, GemmTiles]]:
    """Milliseconds of each that fits on the GPU and gives the same as the first."""
    reference, timed = None, []
    for tiles in tried:
        try:
            out = problem.run(tiles)
        except OutOfResources as error:
            tqdm.write(f"{tiles}: {error}")
            continue
        reference = reference or out
        error = max(((a - b).float().norm() / b.float().norm()).item() for a, b in zip(out, reference))
        if not error <= LARGEST_ERROR:
            raise ValueError(f"{tiles} differ from {tried[0]} by {error:.1e}")
        timed.append((milliseconds(partial(problem.run, tiles), repeats), tiles))
        if not all(torch.equal(a, b) for a, b in zip(out, problem.run(tiles))):
            raise ValueError(f"{tiles} give other bits the second time")
    return timed


def measure(weights: list[str], repeats: int) -> list[dict]:
    """The table's entries, each with the time of the best and of the runner-up."""
    entries = []
    problems = list(itertools.product(weights, ("columns", "rows"), TOKENS))
    for weight, along, tokens in tqdm(problems, unit="product"):
        rows_per_expert = tokens * TOP_K / EXPERTS
        problem = Problem(weight, along, tokens)
        tried = [tiles for tiles in candidates(rows_per_expert) if weight != "dense" or not tiles.decode_first]
        timed = time_all(problem, tried, repeats)
        # a workspace has to be worth its memory
        timed.sort(key=lambda pair: pair[0] * (1 + WORTH_A_WORKSPACE * pair[1].decode_first))
        (best, tiles), (second, _) = timed[:2]
        entries.append(
            {
                "weight": weight,
                "along": along,
                "rows_per_expert": rows_per_expert,
                "tiles": asdict(tiles),
                "milliseconds": round(best, 4),
                "runner_up_milliseconds": round(second, 4),
            }
        )
        tqdm.write(f"{weight} {along} T={tokens}: {best:.3f} ms {tiles}")
        del problem
    return entries


def most_pairs_without_sorting(repeats: int) -> int:
    """Up to how many pairs an NF4 layer's forward is faster pair by pair, with the tiles of the table in use."""
    most = 0
    for tokens in (1, 2, 4, 8, 16):
        (_, up, _, up_term), (_, down, _, down_term) = Problem("packed", "columns", tokens).parts
        hidden_states = torch.randn(tokens, HIDDEN, device="cuda").bfloat16()
        scores = torch.rand(tokens, EXPERTS, device="cuda")
        weights, index = scores.topk(TOP_K)
        factors = [
            Factors(torch.randn(EXPERTS, RANK, weight.in_features, device="cuda"), term.factor, 1.0)
            for weight, term in ((up, up_term), (down, down_term))
        ]
        times = [
            milliseconds(
                partial(run, hidden_states, index, weights, up, down, *factors, None, None, Gate("silu")), repeats
            )
            for run in (experts_forward_gemv, experts_forward)
        ]
        tqdm.write(f"{tokens * TOP_K} pairs: {times[0]:.4f} ms one by one, {times[1]:.4f} ms sorted")
        if times[0] >= times[1]:
            break
        most = tokens * TOP_K
    return most


def with_bounds(entries: list[dict]) -> list[dict]:
    """Replaces the number of rows that was measured by the one up to which an entry holds."""
    bounded = []
    for entry, following in zip(entries, [*entries[1:], None]):
        same = following and (following["weight"], following["along"]) == (entry["weight"], entry["along"])
        bound = math.sqrt(entry["rows_per_expert"] * following["rows_per_expert"]) if same else None
        bounded.append({**entry, "measured_at": entry["rows_per_expert"], "rows_per_expert": bound})
    return bounded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the table, JSON")
    parser.add_argument(
        "--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS), help="the others stay as they are"
    )
    parser.add_argument("--repeats", type=int, default=9, help="timed replays of each candidate")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with context.Pool(arguments.workers) as pool:
        shares = [(number, arguments.workers) for number in range(arguments.workers)]
        pool.map(partial(compile_share, arguments.weights), shares)
    kept = {"entries": []}
    if set(arguments.weights) != set(WEIGHTS):
        kept = json.loads(arguments.output.read_text(encoding="utf-8"))
        kept["entries"] = [entry for entry in kept["entries"] if entry["weight"] not in arguments.weights]
    table = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "layer": {"experts": EXPERTS, "hidden": HIDDEN, "intermediate": INTERMEDIATE, "top_k": TOP_K, "rank": RANK},
        "most_pairs_without_sorting": kept.get("most_pairs_without_sorting")
        or most_pairs_without_sorting(arguments.repeats),
        "like": kept.get("like", {}),
        "entries": kept["entries"] + with_bounds(measure(arguments.weights, arguments.repeats)),
    }
    arguments.output.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
