"""The code that Triton generates for GPUs that are not present; it compiles for them without one."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

# a separate process, since kernels run in the interpreter in this one
COMPILE = """
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import peft_moe_qlora.ops.kernels.decode  # registers what decodes
from peft_moe_qlora.ops.kernels.codec import codec_for
from peft_moe_qlora.ops.kernels.grouped_gemm import _grouped_gemm_kernel
from peft_moe_qlora.ops.kernels.tuning import tuning_table
from peft_moe_qlora.quantization import FourBitFormat
from peft_moe_qlora.quantization.formats import Fp8Format, Mxfp4Format

formats = {"packed": FourBitFormat(), "e4m3": Fp8Format(), "e2m1": Mxfp4Format()}
entries = tuning_table((9, 0)).entries
used = [(one, one.tiles.for_the_other_kernel if one.tiles.specialized else one.tiles) for one in entries]
tried = dict.fromkeys((one.weight, one.along, tiles) for one, tiles in used if one.weight in formats)
for weight, along, tiles in tried:
    if tiles.decode_first or not tiles.weight_left:
        continue
    codec = codec_for(formats[weight], 512, 512, 1, False, torch.bfloat16, True)
    constants = dict(
        STRIDE_FE=1, STRIDE_FN=1, STRIDE_FR=1, HEIGHTS=tiles.heights, N=512, WIDTH=512, K=512, TOP_K=8,
        GATHER=True, ALONG_COLUMNS=along == "columns", CODEC=codec, RANK=0, RANKS=16, HAS_BIAS=False,
        TILE_N=tiles.tile_n, TILE_K=tiles.tile_k, WEIGHT_LEFT=True, LOOPS=False,
    )
    codes, scales = ("i16" if weight == "e4m3" else "u8"), ("u8" if weight == "e2m1" else "fp32")
    types = f"bf16 i32 {codes} {scales} bf16 fp32 bf16 bf16 i32 i32 i32".split()
    signature = dict(zip(_grouped_gemm_kernel.arg_names, ["*" + kind for kind in types] + ["i32"] * 3))
    source = ASTSource(
        _grouped_gemm_kernel,
        {**signature, **dict.fromkeys(constants, "constexpr")},
        constants,
        {(place,): [["tt.divisibility", 16]] for place in range(len(types))},
    )
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    print("TILES", tiles)
    print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ttgir"])
"""


FITS = """
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import peft_moe_qlora.ops.kernels.decode  # registers what decodes
from peft_moe_qlora.ops.dispatch import LARGEST_RANK
from peft_moe_qlora.ops.kernels.codec import DENSE, codec_for
from peft_moe_qlora.ops.kernels.grouped_gemm import _grouped_gemm_kernel
from peft_moe_qlora.ops.kernels.tuning import tuning_table
from peft_moe_qlora.quantization import FourBitFormat
from peft_moe_qlora.quantization.formats import Fp8Format

formats = {"packed": FourBitFormat(), "e4m3": Fp8Format()}
is_new = major >= 10
assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / ("ptxas-blackwell" if is_new else "ptxas")
arch = f"sm_{major}{minor}{'a' if is_new else ''}"
entries = tuning_table((major, minor)).entries
tried = {("dense" if one.tiles.decode_first else one.weight, one.along, one.tiles) for one in entries}
for weight, along, tiles in sorted(tried, key=str):
    is_dense = weight == "dense"
    codec = DENSE if is_dense else codec_for(formats[weight], 512, 512, 1, False, torch.bfloat16, True)
    constants = dict(
        STRIDE_FE=1, STRIDE_FN=LARGEST_RANK, STRIDE_FR=1, HEIGHTS=tiles.heights, N=512, WIDTH=512, K=512, TOP_K=8,
        GATHER=True, ALONG_COLUMNS=along == "columns", CODEC=codec, RANK=LARGEST_RANK, RANKS=LARGEST_RANK,
        HAS_BIAS=False, TILE_N=tiles.tile_n, TILE_K=tiles.tile_k, WEIGHT_LEFT=tiles.weight_left, LOOPS=is_dense,
    )
    codes, scales = {"dense": "bf16", "packed": "u8", "e4m3": "i16"}[weight], "bf16" if is_dense else "fp32"
    types = f"bf16 i32 {codes} {scales} bf16 fp32 bf16 bf16 i32 i32 i32".split()
    signature = dict(zip(_grouped_gemm_kernel.arg_names, ["*" + kind for kind in types] + ["i32"] * 3))
    source = ASTSource(
        _grouped_gemm_kernel,
        {**signature, **dict.fromkeys(constants, "constexpr")},
        constants,
        {(place,): [["tt.divisibility", 16]] for place in range(len(types))},
    )
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 10 * major + minor, 32), options=options)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        command = [assembler, "-v", f"-arch={arch}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    print("FITS", compiled.metadata.shared, re.search(r"(\\d+) bytes spill stores", said)[1], tiles)
"""


def run(program: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (12, 0)])
def test_default_tiles_fit_on_small_gpus(capability: tuple[int, int]) -> None:
    """At the largest rank: 99 KiB of shared memory, and all accumulators in registers."""
    found = re.findall(r"FITS (\d+) (\d+) (.*)", run(f"major, minor = {capability}\n{FITS}"))
    assert len(found) == 16
    for shared, spilled, tiles in found:
        assert int(shared) <= 99 * 1024, tiles
        assert int(spilled) == 0, tiles


def test_async_products_do_not_read_overwritten_registers() -> None:
    """Weights decoded in registers were overwritten while tensor cores still read them, which gave rare wrong tiles.

    An asynchronous product (`isAsync`) of registers (`dot_op`) must be waited for completely and immediately.
    """
    printed = run(COMPILE)
    assert printed.count("TILES") > 0
    products = re.findall(r"warp_group_dot (?P<operands>.*isAsync = true.*dot_op.*)\n(?P<following>.*)", printed)
    assert products, "the tiles of the table have the weight on the left"
    for _, following in products:
        assert "warp_group_dot_wait" in following
        assert "pendings = 0" in following
