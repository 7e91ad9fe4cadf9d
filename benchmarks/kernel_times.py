"""Device time of one layer by kernel.

    python benchmarks/kernel_times.py --tokens 512 4096 16384

Times are device times of torch's profiler, without gaps between launches.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from functools import partial

import torch
import transformers
from arms import ARMS
from measure import MODES, step
from shapes import SHAPES, random_inputs
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile


def kernel_times(call, repeats: int) -> list[tuple[str, float, float]]:
    """Name, launches and microseconds per call of each kernel, slowest first."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as run:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    found = defaultdict(list)
    for event in run.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name].append(event.device_time)
    rows = [(name, len(times) / repeats, sum(times) / repeats) for name, times in found.items()]
    return sorted(rows, key=lambda row: -row[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--arm", choices=ARMS, default="ours-nf4")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 512, 4096, 16384])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["fwd", "fwd+bwd"])
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    device = torch.device("cuda")
    layer = ARMS[args.arm](SHAPES[args.shape], device, 0)
    for tokens in args.tokens:
        inputs = random_inputs(layer.shape, tokens, 0.0, device, seed=tokens)
        for mode in args.modes:
            rows = kernel_times(partial(step(mode), layer, inputs), args.repeats)
            launches, total = (sum(row[index] for row in rows) for index in (1, 2))
            print(f"\n{args.shape}, {args.arm}, T = {tokens}, {mode}: microseconds per step")
            print(
                tabulate([*rows, ("sum", launches, total)], ["kernel", "launches", "us"], floatfmt=("", ".1f", ".1f"))
            )


if __name__ == "__main__":
    main()
