"""The kernel of `specialized_gemm` on simulated warps, and the simulator on kernels with mistakes.

Without a CUDA device only, where Triton's interpreter prepares the operands; `test_specialized_gemm` uses a device.
"""

from __future__ import annotations

import sys

import pytest
import torch

from peft_moe_qlora.ops import Gate, packed_weight
from peft_moe_qlora.quantization import Format, FourBitFormat
from peft_moe_qlora.quantization.formats import Fp8Format, Mxfp4Format

pytest.importorskip("triton", reason="the kernels need Triton")

from experts_layer import run_layer
from gluon_on_cpu import launch_on_cpu
from kernel_cases import GRIDS, NF4, random_stack, relative_error
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from peft_moe_qlora.ops import fused_steps
from peft_moe_qlora.ops.kernels import codec, specialized_gemm
from peft_moe_qlora.ops.kernels.gemm_operands import LowRankTerm, Rows
from peft_moe_qlora.ops.kernels.schedule import cut_tiles, sort_pairs
from peft_moe_qlora.ops.kernels.specialized_copy import copy_async
from peft_moe_qlora.ops.kernels.tuning import GemmTiles

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel runs on the CUDA device")

DTYPES = [torch.bfloat16, torch.float16]
LIMITS = {torch.bfloat16: 2.8e-3, torch.float16: 3.3e-4}
"""Relative errors of rounding weights and results, of 2.4e-3 and 2.9e-4, and of the rounded table of NF4."""
HEIGHTS = [(256, 128, 32), (128, 64, 32), (32,)]
COUNTS = (0, 37, 140, 3)
"""Rows of each expert; there are some without an expert, too."""


@pytest.fixture(autouse=True)
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.full(shape, torch.nan, dtype=dtype, device=device)

    monkeypatch.setattr(codec, "runs_ptx", lambda device: True)
    # three programs, so that each has several tiles
    replacements = {"launch": launch_on_cpu, "allocate": allocate, "_multiprocessors": lambda device: 3}
    for name, replacement in replacements.items():
        monkeypatch.setattr(specialized_gemm, name, replacement)


def product_error(
    storage: Format,
    dtype: torch.dtype,
    shape: tuple[int, int] = (200, 192),
    for_input_gradient: bool = False,
    is_gathered: bool = True,
    heights: tuple[int, ...] = HEIGHTS[1],
    num_stages: int = 4,
    rank: int = 0,
    has_bias: bool = False,
    counts: tuple[int, ...] = COUNTS,
) -> float:
    """Error of the product with weights of `shape`, relative to the exact one."""
    num_experts = len(counts)
    weight = packed_weight(random_stack((num_experts, *shape), False, storage))
    assert weight.tile_block is not None
    n, k = reversed(shape) if for_input_gradient else shape
    num_rows = sum(counts)
    ids = torch.repeat_interleave(torch.arange(num_experts + 1), torch.tensor([*counts, 6 + num_rows % 2]))
    ids = ids[torch.randperm(len(ids))].view(-1, 2)
    rows = sort_pairs(ids, num_experts)
    pair = rows.pair_of_row.long()
    expert = ids.flatten()[pair[:num_rows]]
    tokens = torch.randn(len(ids), k).to(dtype)
    x = tokens[pair // 2]
    x[num_rows:] = torch.nan
    term = None
    if rank:
        reduced, factor = torch.randn(len(pair), rank).to(dtype), torch.randn(num_experts, rank, n) * 0.1
        reduced[num_rows:] = torch.nan
        term = LowRankTerm(reduced, factor.transpose(1, 2))
    bias = torch.randn(num_experts, n) if has_bias else None
    out = specialized_gemm.specialized_gemm(
        Rows(tokens, rows.pair_of_row, 2) if is_gathered else Rows(x),
        weight,
        for_input_gradient,
        rows.ends,
        cut_tiles(rows, heights),
        GemmTiles(heights, 128, 64, 4, num_stages, weight_left=True, decode_first=False, specialized=True),
        term,
        bias,
    )
    matrices = torch.stack([weight.decode_expert(one, torch.float32) for one in range(num_experts)])
    if not for_input_gradient:
        matrices = matrices.transpose(1, 2)  # now (E, K, N)
    x = x[:num_rows].float()
    expected = torch.cat([x[expert == one] @ matrices[one] for one in range(num_experts)])
    if term is not None:
        # the kernel rounds factors to the dtype of the rows
        factors = factor.to(dtype).float()[expert]
        expected += torch.einsum("sr,srn->sn", reduced[:num_rows].float(), factors)
    if bias is not None:
        expected += bias[expert]
    assert out.dtype == dtype
    assert out[num_rows:].isnan().all(), "rows without an expert are not written"
    return relative_error(out[:num_rows], expected)


@pytest.mark.parametrize("for_input_gradient", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", [NF4, FourBitFormat("nf4", 64, True), FourBitFormat("fp4", 32), *GRIDS], ids=str)
def test_formats(storage: Format, dtype: torch.dtype, for_input_gradient: bool) -> None:
    """With columns and a contraction that end within a tile or a step, in one orientation or both."""
    assert product_error(storage, dtype, for_input_gradient=for_input_gradient) <= LIMITS[dtype]


@pytest.mark.parametrize("for_input_gradient", [False, True])
@pytest.mark.parametrize("num_stages", [2, 3, 4])
@pytest.mark.parametrize(
    ("shape", "storage"),
    [
        ((256, 512), NF4),  # whole rings of 2 and 4 stages
        ((192, 64), FourBitFormat("fp4", 32)),  # as many steps as stages, and one step
        ((136, 264), Fp8Format()),  # a contraction that ends within a step in both orientations
        ((72, 352), Mxfp4Format()),
        ((128, 128), Fp8Format((1, 0))),
    ],
    ids=str,
)
def test_sizes(shape: tuple[int, int], storage: Format, num_stages: int, for_input_gradient: bool) -> None:
    dtype = DTYPES[num_stages % 2]
    error = product_error(storage, dtype, shape, for_input_gradient, num_stages=num_stages)
    assert error <= LIMITS[dtype]


@pytest.mark.parametrize("is_gathered", [False, True])
@pytest.mark.parametrize("heights", [*HEIGHTS, (16,)], ids=str)
@pytest.mark.parametrize("counts", [(300, 0, 129), (0, 0, 1, 0), (32, 64, 128), (0, 0)], ids=str)
def test_rows(counts: tuple[int, ...], heights: tuple[int, ...], is_gathered: bool) -> None:
    error = product_error(NF4, torch.float16, (136, 128), heights=heights, is_gathered=is_gathered, counts=counts)
    assert error <= LIMITS[torch.float16]


@pytest.mark.parametrize("is_gathered", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("for_input_gradient", [False, True])
@pytest.mark.parametrize("rank", [0, 2, 4, 16, 38, 64, 128])
def test_low_rank_term_and_bias(rank: int, for_input_gradient: bool, dtype: torch.dtype, is_gathered: bool) -> None:
    error = product_error(
        NF4, dtype, (200, 64), for_input_gradient, is_gathered, num_stages=2, rank=rank, has_bias=True
    )
    assert error <= LIMITS[dtype]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", [0, 4])
def test_layer_and_all_gradients(rank: int, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp16, since Triton's interpreter does not compute in bf16."""
    tuned = GemmTiles((32,), 128, 64, 8, 2, weight_left=True, decode_first=False, specialized=True)
    monkeypatch.setattr(fused_steps, "choose_tiles", lambda *_: tuned)
    shapes = ((128, 64), (64, 64))
    up, down = (
        random_stack((3, *(shape[::-1] if transposed else shape)), transposed, storage)
        for shape, storage in zip(shapes, (NF4, Fp8Format()))
    )
    for found, expected in run_layer(40, 2, (up, down), Gate("silu"), rank, True, torch.float16):
        assert relative_error(found, expected) <= 1e-3


@pytest.mark.parametrize("storage", [NF4, Fp8Format()], ids=str)
def test_columns_in_another_order_are_noticed(storage: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    @gluon.jit
    def column_of(row):
        return row

    for name, module in list(sys.modules.items()):
        if name.startswith("peft_moe_qlora.ops.kernels.") and hasattr(module, "column_of"):
            monkeypatch.setattr(module, "column_of", column_of)
    assert product_error(storage, torch.bfloat16) > 0.5


@gluon.jit
def _copy_steps(X, ring, full, empty, STEPS: gl.constexpr, MISTAKE: gl.constexpr):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, LAYOUT)), 1)
    place = X + row * 64 + gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, LAYOUT)), 0)
    for step in range(STEPS + 1 if MISTAKE == "one step more" else STEPS):
        stage = step % 2
        if MISTAKE != "copies early":
            mbarrier.wait(empty.index(stage), step // 2 % 2 ^ 1)
        copy_async(ring.index(stage), place + step * 64 * 64)
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
        if MISTAKE == "arrives again":
            mbarrier.arrive(full.index(stage))


@gluon.jit
def _multiply_steps(W, OUT, ring, full, empty, STEPS: gl.constexpr, MISTAKE: gl.constexpr):
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    row = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, LAYOUT)), 1)
    place = row * 64 + gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, LAYOUT)), 0)
    weights = gl.convert_layout(gl.load(W + place), gl.DotOperandLayout(0, LAYOUT, 2))
    acc = gl.zeros([64, 64], gl.float32, LAYOUT)
    for step in range(STEPS):
        stage = step % 2
        if MISTAKE != "reads early":
            mbarrier.wait(full.index(stage), step // 2 % 2)
        if MISTAKE != "no fence":
            fence_async_shared()
        acc = warpgroup_mma(weights, ring.index(stage), acc, is_async=True)
        if MISTAKE == "frees early":
            mbarrier.arrive(empty.index(stage))
        acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
        if MISTAKE != "frees early" and MISTAKE != "never frees":
            mbarrier.arrive(empty.index(stage))
    gl.store(OUT + gl.program_id(0) * 64 * 64 + place, acc)


@gluon.jit
def _sum_of_products(X, W, OUT, STEPS: gl.constexpr, MISTAKE: gl.constexpr):
    """The sum of `W` times each of `STEPS` matrices, in each program."""
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16)
    ring = gl.allocate_shared_memory(X.dtype.element_ty, [2, 64, 64], SHARED)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(2):
        mbarrier.init(full.index(stage), 128)
        mbarrier.init(empty.index(stage), 1)
    gl.warp_specialize(
        [
            (_multiply_steps, (W, OUT, ring, full, empty, STEPS, MISTAKE)),
            (_copy_steps, (X, ring, full, empty, STEPS, MISTAKE)),
        ],
        [4],
        [64],
    )


def sum_of_products(mistake: str) -> bool:
    """Whether the result of a kernel with this mistake is right in all programs."""
    x, w = torch.randn(7, 64, 64).half(), torch.randn(64, 64).half()
    out = torch.empty(3, 64, 64)
    launch_on_cpu(_sum_of_products, (3,), (x, w, out), (), STEPS=7, MISTAKE=mistake)
    return all(relative_error(one, w.float() @ x.float().sum(0)) < 1e-5 for one in out)


def test_simulated_warps() -> None:
    assert sum_of_products("")


@pytest.mark.parametrize("mistake", ["copies early", "reads early", "frees early"])
def test_accesses_in_a_wrong_order_are_noticed(mistake: str) -> None:
    try:
        assert not sum_of_products(mistake)
    except RuntimeError as error:
        assert "barrier" in str(error)  # noqa: PT017 - an error or a wrong result


@pytest.mark.parametrize(
    ("mistake", "error", "message"),
    [
        ("one step more", IndexError, "outside"),
        ("never frees", RuntimeError, "deadlock"),
        ("arrives again", RuntimeError, "arrivals"),
        ("no fence", RuntimeError, "fence"),
    ],
)
def test_other_mistakes_are_errors(mistake: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sum_of_products(mistake)
