"""Measures the fastest tiles for each product on this GPU, and writes the table of the package.

    python benchmarks/tune.py --output peft_moe_qlora/ops/kernels/tables/sm90.json --shapes qwen3-30b-a3b mixtral-8x7b

For each layer shape, number of rows per expert, weight and direction, all candidates compute the same product on
random inputs, with a low-rank term of rank 16; the fastest correct candidate is chosen. An entry applies up to the
geometric mean of its number of rows and the next one. New entries replace those of the same product; other entries are
kept. `peft-moe-qlora tune` does the same with fewer candidates for a user's model.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from shapes import SHAPES, Shape
from tqdm import tqdm

from peft_moe_qlora.ops import Factors, Gate
from peft_moe_qlora.ops.fused_steps import experts_forward, experts_forward_gemv
from peft_moe_qlora.ops.layer_shape import LayerShape
from peft_moe_qlora.ops.tune import Problem, graph_milliseconds, measure_layer, products_of
from peft_moe_qlora.quantization import FourBitFormat
from peft_moe_qlora.quantization.formats import Fp8Format, Mxfp4Format

RANK = 16
TOKENS = (1, 16, 128, 512, 1024, 2048, 4096, 8192, 16384)
WEIGHTS = {"packed": FourBitFormat(), "e4m3": Fp8Format(), "e2m1": Mxfp4Format(), "dense": None}
"""Weight in the table -> representative format."""


def layer_shape(shape: Shape) -> LayerShape:
    """Sizes and orientation of the matrices of an experts class."""
    is_transposed = bool(getattr(shape.experts_on_meta(), "is_transposed", False))
    return LayerShape(shape.num_experts, shape.hidden, shape.intermediate, shape.top_k, is_transposed)


def question(entry: dict[str, Any]) -> tuple:
    return entry["weight"], entry["along"], entry.get("n"), entry.get("k")


def measure(
    shapes: list[str], weights: list[str], tokens: list[int], repeats: int, workers: int
) -> list[dict[str, Any]]:
    """Measures the entries of the table, with the times of the best and the second best tiles."""
    entries = []
    for name in shapes:
        shape = layer_shape(SHAPES[name])
        rows = [number * shape.top_k / shape.experts for number in tokens]
        for weight in weights:
            found = measure_layer(
                shape,
                WEIGHTS[weight],
                RANK,
                rows,
                workers,
                thorough=True,
                timer=partial(graph_milliseconds, repeats=repeats),
            )
            entries += [{**entry, "weight": weight, "layer": name} for entry in found]
    # layers may share a product; the first entry is used
    found = {
        (*question(entry), entry["measured_at"], entry["tiles"]["specialized"]): entry for entry in reversed(entries)
    }
    return list(found.values())[::-1]


def most_pairs_without_sorting(repeats: int) -> int:
    """Largest number of pairs for which the forward of an NF4 layer is faster pair by pair, with the current table."""
    shape = layer_shape(SHAPES["qwen3-30b-a3b"])
    up, down = (
        Problem(product, shape.experts, shape.top_k, 1, WEIGHTS["packed"], RANK)
        for product in products_of(shape, WEIGHTS["packed"])[:2]
    )
    factors = [
        Factors(torch.randn(shape.experts, RANK, problem.weight.in_features, device="cuda"), problem.term.factor, 1.0)
        for problem in (up, down)
    ]
    most = 0
    for tokens in (1, 2, 4, 8, 16):
        hidden_states = torch.randn(tokens, shape.hidden, device="cuda").bfloat16()
        weights, index = torch.rand(tokens, shape.experts, device="cuda").topk(shape.top_k)
        arguments = (hidden_states, index, weights, up.weight, down.weight, *factors, None, None, Gate("silu"))
        times = [
            graph_milliseconds(partial(run, *arguments), repeats) for run in (experts_forward_gemv, experts_forward)
        ]
        tqdm.write(f"{tokens * shape.top_k} pairs: {times[0]:.4f} ms pair by pair, {times[1]:.4f} ms sorted")
        if times[0] >= times[1]:
            break
        most = tokens * shape.top_k
    return most


def merged(entries: list[dict[str, Any]], kept: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """New entries, and old ones that they do not replace."""
    new = {question(entry) for entry in entries}
    return entries + [entry for entry in kept if question(entry) not in new]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="output file for the table, JSON")
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=["qwen3-30b-a3b"], help=("shapes of layers to measure")
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        choices=WEIGHTS,
        default=list(WEIGHTS),
        help=("weights to measure; entries of the others are kept"),
    )
    parser.add_argument(
        "--tokens",
        nargs="+",
        type=int,
        default=TOKENS,
        help="numbers of tokens to measure; entries of a measured product for others are replaced, too",
    )
    parser.add_argument("--repeats", type=int, default=9, help="timed replays per candidate")
    parser.add_argument("--workers", type=int, default=12, help="number of compilation processes")
    arguments = parser.parse_args()
    before = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else {}
    entries = measure(arguments.shapes, arguments.weights, arguments.tokens, arguments.repeats, arguments.workers)
    table = {
        **before,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "most_pairs_without_sorting": before.get("most_pairs_without_sorting")
        or most_pairs_without_sorting(arguments.repeats),
        "like": before.get("like", {}),
        "entries": merged(entries, before.get("entries", [])),
    }
    arguments.output.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
