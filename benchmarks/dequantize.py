"""Times the decoding of whole stacks to bf16 on a GPU, for 4-bit formats also with bitsandbytes.

    python benchmarks/dequantize.py --shapes qwen3-30b-a3b gpt-oss-20b --storages nf4/64 fp8/128x128

Bytes are the codes and scales that are read, plus the weights that are written. The result is compared bit for bit
with that of bitsandbytes or torch.
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
from peft_moe_qlora.quantization import FourBitFormat, QuantizedStack, parse_format
from peft_moe_qlora.quantization.formats.four_bit import dequantize

DTYPE = torch.bfloat16


def measure(stack: QuantizedStack, repeats: int) -> tuple[float, float | None]:
    """Terabytes per second of this package, and of bitsandbytes if it supports the format.

    Raises:
        ValueError: the decoded weights differ from the reference.
    """
    weight = packed_weight(stack)
    device, storage = stack.codes.device, stack.storage
    shape = (stack.num_experts, weight.rows, weight.columns)
    ours, theirs = partial(decode, weight, 0, stack.num_experts, DTYPE), None
    if isinstance(storage, FourBitFormat):
        scales = stack.scales(slice(None)).flatten()
        theirs = partial(dequantize, stack.codes.flatten(), scales, math.prod(shape), storage, DTYPE)
    if not torch.equal(ours(), stack.decode(DTYPE) if theirs is None else theirs().view(shape)):
        raise ValueError(f"Decoded weights of {storage} differ from those of the reference.")
    num_bytes = stack.nbytes + math.prod(shape) * DTYPE.itemsize
    runs = (ours, theirs) if theirs is not None else (ours,)
    found = [num_bytes / time_calls([run], device, repeats, warmup=3).ms / 1e9 for run in runs]
    return found[0], found[1] if len(found) > 1 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["qwen3-30b-a3b"])
    parser.add_argument("--storages", nargs="+", default=["nf4/64"], help="names of formats")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This benchmark requires a GPU, but torch finds none.")
    transformers.logging.set_verbosity_error()
    device, rows = torch.device("cuda"), []
    for name in tqdm(args.shapes):
        experts = SHAPES[name].experts(device, seed=0)
        for projection in ("gate_up_proj", "down_proj"):
            dense = experts.get_parameter(projection).detach()
            for storage in args.storages:
                stack = QuantizedStack.from_dense(dense, experts.is_transposed, parse_format(storage))
                rows.append((name, projection, storage, *dense.shape, *measure(stack, args.repeats)))
    print(torch.cuda.get_device_name())
    headers = ["shape", "stack", "storage", "experts", "rows", "columns", "ours TB/s", "bitsandbytes TB/s"]
    print(tabulate(rows, headers, floatfmt=".2f"))


if __name__ == "__main__":
    main()
