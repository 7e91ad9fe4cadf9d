"""Compiles all kernels of the package for compute capability 9.0 without a GPU, and prints the results as JSON.

`python compile_kernels.py DTYPE`, with the dtype of the activations and without TRITON_INTERPRET. The functions of the
package run on uninitialized CPU tensors. `launch` is replaced by a function that only records the kernel's signature.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import torch
from kernel_cases import GATES, GRIDS, NF4, specialized_tiles
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource

from peft_moe_qlora.ops import Factors, Gate, packed_weight
from peft_moe_qlora.ops.fused_experts import fused_experts
from peft_moe_qlora.ops.fused_steps import frozen_product
from peft_moe_qlora.ops.kernels import codec, gate_low_rank, low_rank, specialized_gemm, specialized_support, tuning
from peft_moe_qlora.ops.kernels.decode import decode
from peft_moe_qlora.ops.kernels.gemm_operands import LowRankTerm, Rows
from peft_moe_qlora.ops.kernels.grouped_gemm import grouped_gemm
from peft_moe_qlora.ops.kernels.launch import launch
from peft_moe_qlora.ops.kernels.schedule import cut_tiles, sort_pairs
from peft_moe_qlora.ops.operands import PackedWeight
from peft_moe_qlora.quantization import DenseStack, Format, FourBitFormat, QuantizedStack
from peft_moe_qlora.quantization.formats import Fp8Format, Mxfp4Format, Nvfp4Format

TARGET = GPUTarget("cuda", 90, 32)
SHARED_BYTES = 227 * 2**10
BF16, FP16, FP32 = DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FORMATS = (None, NF4, FourBitFormat("nf4", 64, True), FourBitFormat("fp4", 32), FourBitFormat("fp4", 32, True), *GRIDS)
TYPES = {
    BF16: "*bf16",
    FP16: "*fp16",
    FP32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.uint8: "*u8",
    int: "i32",
    float: "fp32",
}


class Signature(NamedTuple):
    """What a binary depends on, with all pointers aligned to 16 bytes.

    Args:
        kernel: the kernel.
        types: types of pointers and numbers, in order.
        constants: names and values of the constants that follow.
        options: names and values of options of the compiler.
    """

    kernel: Any
    types: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]

    def compile(self, is_complete: bool) -> None:
        """Creates Triton's IR, which checks types, or with `is_complete` a binary, without the cache on disk."""
        constants = dict(self.constants)
        types = {**dict(zip(self.kernel.arg_names, self.types)), **dict.fromkeys(constants, "constexpr")}
        pointers = [place for place, kind in enumerate(self.types) if kind.startswith("*")]
        attributes = {(place,): [["tt.divisibility", 16]] for place in pointers}
        source = (GluonASTSource if self.kernel.is_gluon() else ASTSource)(self.kernel, types, constants, attributes)
        backend = make_backend(TARGET)
        options = backend.parse_options({**dict(self.options), **source.parse_options()})
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        functions = backend.get_codegen_implementation(options)
        module = source.make_ir(TARGET, options, functions, backend.get_module_map(), context)
        if not is_complete:
            return
        stages: dict[str, Callable] = {}
        variables = 0
        backend.add_stages(stages, options, source.language)
        metadata = {"target": TARGET, **vars(options)}
        for name, stage in stages.items():
            module = stage(module, metadata)
            if name == "ptx":
                # of assembly in the kernel
                variables = sum(map(int, re.findall(r"\.shared [^;]*\.b8 \w+\[(\d+)\]", module)))
        if metadata["shared"] + variables > SHARED_BYTES:
            raise ValueError(f"{metadata['shared']} + {variables} bytes of shared memory exceed {SHARED_BYTES}")

    def __str__(self) -> str:
        values = (*self.types, *dict(self.constants).values())
        return ", ".join(f"{name}: {value}" for name, value in zip(self.kernel.arg_names, values))


def record_launches() -> dict[Signature, None]:
    """Makes the package choose as on an H200 and record launches; returns the signatures, which later calls extend."""
    found: dict[Signature, None] = {}
    parameters = inspect.signature(launch)

    def record(*args: Any, **kwargs: Any) -> None:
        bound = parameters.bind(*args, **kwargs)
        bound.apply_defaults()
        options = bound.arguments  # those of the compiler are left
        kernel, _, tensors, numbers, constants = map(
            options.pop, ("kernel", "grid", "tensors", "numbers", "constants")
        )
        types = [TYPES[tensor.dtype] for tensor in tensors] + [TYPES[type(number)] for number in numbers]
        found[Signature(kernel, tuple(types), tuple(constants.items()), tuple(options.items()))] = None

    for name, module in list(sys.modules.items()):
        if name.startswith("peft_moe_qlora.") and callable(getattr(module, "launch", None)):
            module.launch = record
    table = tuning.tuning_table((9, 0))
    tuning._table_of = lambda device, dtype: table if dtype.itemsize == 2 else None
    codec.runs_ptx = specialized_support._runs_on = lambda device: True
    low_rank.has_much_shared_memory = gate_low_rank.has_much_shared_memory = lambda device: True
    specialized_gemm._multiprocessors = lambda device: 132
    specialized_gemm.WIDE_COLUMNS = 544
    return found


def empty(*shape: int, dtype: torch.dtype, is_leaf: bool = True) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=is_leaf)


def weight_of(
    experts: int, outputs: int, inputs: int, storage: Format | None, transposed: bool, dtype: torch.dtype, parts: int
) -> PackedWeight:
    shape = torch.Size((experts, inputs, outputs) if transposed else (experts, outputs, inputs))
    if storage is None:
        return packed_weight(DenseStack(torch.empty(shape, dtype=dtype), transposed))
    return packed_weight(QuantizedStack(shape, dtype, transposed, storage, parts=parts))


def run_layer(
    dtype: torch.dtype,
    storage: Format | None = NF4,
    transposed: bool = False,
    tokens: int = 600,
    factors: torch.dtype = FP32,
    weights: torch.dtype = FP32,
    bias: torch.dtype | None = None,
    stored: torch.dtype | None = None,
    ids: torch.dtype = torch.int64,
    gate: Gate = GATES[0],
    rank: int = 16,
    experts: int = 4,
    hidden: int = 256,
    intermediate: int = 128,
    backward: bool = True,
) -> None:
    """Launches all kernels of the layer; without `backward` and with few tokens, those for generation."""
    of = (storage, transposed, stored or dtype)
    up = weight_of(experts, 2 * intermediate, hidden, *of, 2)
    down = weight_of(experts, hidden, intermediate, *of, 1)
    terms = (None, None)
    if rank:
        shapes = [(rank, hidden), (2 * intermediate, rank), (rank, intermediate), (hidden, rank)]
        A, B, C, D = (empty(experts, *shape, dtype=factors) for shape in shapes)
        terms = (Factors(A, B, 0.5), Factors(C, D, 0.5))
    sizes = (2 * intermediate, hidden)
    biases = [None if bias is None else empty(experts, size, dtype=bias, is_leaf=False) for size in sizes]
    top_k_index = torch.zeros((tokens, 2), dtype=ids)
    inputs = [empty(tokens, hidden, dtype=dtype), empty(tokens, 2, dtype=weights)]
    with torch.set_grad_enabled(backward):
        out = fused_experts(inputs[0], top_k_index, inputs[1], up, down, gate, *terms, *biases)
    if backward:
        torch.autograd.grad(out, [*inputs, *[factor for term in terms if term for factor in term[:2]]], out)


def run_specialized(
    dtype: torch.dtype,
    storage: Format,
    heights: tuple[int, ...],
    factors: torch.dtype,
    rank: int = 16,
    num_stages: int = 4,
) -> None:
    """Launches the products with specialized warps, in both directions, also for ragged sizes."""
    for size, own_rank, is_gathered in ((1024, rank, True), (544, 0, False)):
        weight = weight_of(4, size, size, storage, False, dtype, 1)
        if weight.tile_block is None:
            continue
        routed = sort_pairs(torch.zeros(64, 2, dtype=torch.int64), 4)
        rows = Rows(empty(64, size, dtype=dtype), routed.pair_of_row, 2) if is_gathered else None
        rows = rows or Rows(empty(128, size, dtype=dtype))
        term = (
            LowRankTerm(empty(128, own_rank, dtype=dtype), empty(4, size, own_rank, dtype=factors))
            if own_rank
            else None
        )
        bias = None if own_rank else empty(4, size, dtype=factors)
        tuned = specialized_tiles(heights, num_stages)
        for for_input_gradient in (False, True):
            tiles = cut_tiles(routed, tuned.cut)
            grouped_gemm(rows, weight, for_input_gradient, routed.ends, tiles, tuned, term, bias)


def run_everything(dtype: torch.dtype) -> None:
    """Runs each format, dtype and option with activations in one dtype."""
    # factor gradients in several runs and in one; generation
    sizes: list[dict[str, Any]] = [{}, {"tokens": 8}, {"tokens": 8, "backward": False}]
    for size, factors, weights in product(sizes, DTYPES, DTYPES):
        run_layer(dtype, factors=factors, weights=weights, **size)
    for size, stored in product(sizes, DTYPES):
        run_layer(dtype, None, stored=stored, factors=BF16, **size)
    for size, (number, gate) in product(sizes, enumerate(GATES)):
        run_layer(dtype, gate=gate, bias=DTYPES[number % 3], **size)
    for size, rank in product(sizes, (0, 1, 128)):
        run_layer(dtype, rank=rank, factors=dtype, ids=torch.int32, **size)
    for storage, (number, size) in product(FORMATS, enumerate(sizes)):
        for transposed in (False,) if storage is not None and storage.is_out_in else (False, True):
            run_layer(dtype, storage, transposed, factors=DTYPES[number], **size)
    # sizes that are not multiples of tiles and blocks; some formats do not support them
    for storage, size in product(FORMATS[DTYPES.index(dtype) :: 3], sizes[1:]):
        if storage is None or storage.flat_blocksize or storage.tile_block(80, 96, 2):
            run_layer(dtype, storage, hidden=96, intermediate=40, **size)
    if dtype != FP32:
        for number, storage in enumerate(FORMATS[1:]):
            run_specialized(dtype, storage, (32,), DTYPES[number % 3])
    # other tiles; of products with specialized warps, the largest ones, the most shared memory, and tiles for operands
    # that do not suit
    if dtype == BF16:
        for tokens, storage in product((1, 40, 4000), (None, NF4, Fp8Format(), Mxfp4Format())):
            run_layer(dtype, storage, tokens=tokens)
        for storage in (NF4, Fp8Format((1, 16)), Nvfp4Format()):
            run_specialized(dtype, storage, (256, 128, 32), FP32, rank=64)
        for storage in (NF4, Nvfp4Format(), Fp8Format()):
            run_specialized(dtype, storage, (160, 128, 32), FP32)
        run_specialized(dtype, NF4, (256, 128, 32), FP32)
        run_specialized(dtype, NF4, (256, 128, 32), FP32, rank=255)
        run_specialized(dtype, NF4, (128, 32), FP32, rank=64, num_stages=8)
    # stacks and matrices that exceed the workspace for decoded weights
    for storage in (NF4, Fp8Format()):
        run_layer(dtype, storage, experts=8, hidden=4096, intermediate=4096)
        run_layer(dtype, storage, tokens=150, experts=1, hidden=16384, intermediate=8192)
    for storage in FORMATS:
        frozen = weight_of(4, 256, 128, storage, False, dtype, 1)
        ends = torch.zeros(4, dtype=torch.int32)
        for for_input_gradient, features in ((False, 128), (True, 256)):
            frozen_product(torch.zeros(64, features, dtype=dtype), frozen, ends, for_input_gradient)
        if storage is not None:
            decode(frozen, 0, 4, dtype)


def messages(error: BaseException | None) -> str:
    """The error and its causes, since Triton raises one error per level of calls."""
    found = []
    while error is not None:
        found.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return "\n".join(found)


def main(dtype: torch.dtype) -> None:
    signatures = record_launches()
    run_everything(dtype)
    failures: dict[tuple, str] = {}
    completed = set()
    for signature in signatures:
        name, types = signature.kernel.__name__, signature.types
        # a binary for each mix of types; those with decoders take longest, so only a few for each decoder
        constants = dict(signature.constants)
        shape = constants.get("SHAPE")
        found = constants.get("CODEC") if shape is None else shape.codec
        way = (name, types if found is None else found.name, constants.get("RANKS", 0) > 128)
        way += (constants.get("KIND"), constants.get("INTERLEAVED"))  # of gates
        if shape is not None and shape.heights[0] > 32:
            way += (shape.along_columns, shape.heights[0], shape.stages)
        print(name, signature, file=sys.stderr, flush=True)  # if the compiler crashes, the last one caused it
        try:
            signature.compile(is_complete=way not in completed)
        except Exception as error:
            failures.setdefault((name, types, messages(error)), f"{name}({signature}):\n{messages(error)}")
        completed.add(way)
    names = sorted({signature.kernel.__name__ for signature in signatures})
    counts = {"signatures": len(signatures), "binaries": len(completed)}
    print(json.dumps({"kernels": names, "failures": list(failures.values()), **counts}))


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1]))
