"""Times decoding whole 4-bit stacks into bf16 on a GPU, beside bitsandbytes.

    python benchmarks/dequantize.py --shapes qwen3-30b-a3b gpt-oss-20b

Bytes are those of codes and scales, read, and of the weights, written. Both results are compared bit for bit.
"""

from __future__ import annotations

import argparse
import math
import sys
from functools import partial

import torch
import transformers
from measure import time_calls
from shapes import SHAPES
from tabulate import tabulate
from tqdm.auto import tqdm

from peft_moe_qlora.ops import packed_weight
from peft_moe_qlora.ops.kernels.decode import decode
from peft_moe_qlora.quantization import FourBitFormat, QuantizedStack
from peft_moe_qlora.quantization.formats.four_bit import dequantize

DTYPE = torch.bfloat16


def measure(stack: QuantizedStack, repeats: int) -> tuple[float, float]:
    """Terabytes per second of ours and of bitsandbytes.

    Raises:
        ValueError: the two give different bits.
    """
    weight = packed_weight(stack)
    device, storage = stack.codes.device, stack.storage
    shape = (stack.num_experts, weight.rows, weight.columns)
    ours = partial(decode, weight, 0, stack.num_experts, DTYPE)
    theirs = partial(
        dequantize, stack.codes.flatten(), stack.scales(slice(None)).flatten(), math.prod(shape), storage, DTYPE
    )
    if not torch.equal(ours(), theirs().view(shape)):
        raise ValueError("decoded weights differ from those of bitsandbytes.")
    num_bytes = stack.codes.nbytes + stack.block_absmax.nbytes + math.prod(shape) * DTYPE.itemsize
    times = [time_calls([run], device, repeats, warmup=3).ms for run in (ours, theirs)]
    return num_bytes / times[0] / 1e9, num_bytes / times[1] / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["qwen3-30b-a3b"])
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("decoding is timed on a GPU; torch sees none.")
    transformers.logging.set_verbosity_error()
    device, rows = torch.device("cuda"), []
    for name in tqdm(args.shapes):
        experts = SHAPES[name].experts(device, seed=0)
        for projection in ("gate_up_proj", "down_proj"):
            dense = experts.get_parameter(projection).detach()
            stack = QuantizedStack.from_dense(dense, experts.is_transposed, FourBitFormat())
            rows.append((name, projection, *dense.shape, *measure(stack, args.repeats)))
    print(torch.cuda.get_device_name())
    headers = ["shape", "stack", "experts", "rows", "columns", "ours TB/s", "bitsandbytes TB/s"]
    print(tabulate(rows, headers, floatfmt=".2f"))


if __name__ == "__main__":
    main()
