"""Values of the kernel with specialized warps, on a GPU of compute capability 9.0 or on simulated warps."""

from __future__ import annotations

import sys

import pytest
import torch

from peft_moe_qlora.ops import Gate, packed_weight
from peft_moe_qlora.quantization import Format, FourBitFormat
from peft_moe_qlora.quantization.formats import Fp8Format, Mxfp4Format, Nvfp4Format

pytest.importorskip("triton", reason="the kernels need Triton")

from experts_layer import run_layer
from gluon_on_cpu import launch_on_cpu
from kernel_cases import DEVICE, GRIDS, NF4, random_stack, relative_error, specialized_tiles
from triton.experimental import gluon

from peft_moe_qlora.ops import fused_steps
from peft_moe_qlora.ops.kernels import codec, specialized_gemm
from peft_moe_qlora.ops.kernels.gemm_operands import LowRankTerm, Rows
from peft_moe_qlora.ops.kernels.grouped_gemm import grouped_gemm
from peft_moe_qlora.ops.kernels.launch_recorder import forget_recordings
from peft_moe_qlora.ops.kernels.schedule import cut_tiles, sort_pairs
from peft_moe_qlora.ops.kernels.specialized_shape import GemmShape

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="the kernel is for compute capability 9.0",
)

DTYPES = [torch.bfloat16, torch.float16]
LIMITS = {torch.bfloat16: 2.8e-3, torch.float16: 3.3e-4}
"""Relative errors of rounding weights and results, of 2.4e-3 and 2.9e-4, and of the rounded table of NF4."""
HEIGHTS = [(256, 128, 32), (128, 64, 32), (32,), (288, 256, 128, 32), (160, 128, 32)]
COUNTS = (0, 37, 140, 3)
"""Rows of each expert; there are some without an expert, too."""


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three programs, so that each has several tiles; simulated without a GPU."""
    monkeypatch.setattr(specialized_gemm, "_multiprocessors", lambda device: 3)
    if DEVICE.type == "cuda":
        return

    def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.full(shape, torch.nan, dtype=dtype, device=device)

    monkeypatch.setattr(codec, "runs_ptx", lambda device: True)
    monkeypatch.setattr(specialized_gemm, "launch", launch_on_cpu)
    monkeypatch.setattr(specialized_gemm, "allocate", allocate)


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
    offset: int = 0,
) -> float:
    """Error of the product with weights of `shape`; rows are `offset` elements behind an aligned address."""
    num_experts = len(counts)
    weight = packed_weight(random_stack((num_experts, *shape), False, storage))
    assert weight.tile_block is not None
    n, k = reversed(shape) if for_input_gradient else shape
    num_rows = sum(counts)
    ids = torch.repeat_interleave(torch.arange(num_experts + 1), torch.tensor([*counts, 6 + num_rows % 2]))
    ids = ids[torch.randperm(len(ids))].view(-1, 2).to(DEVICE)
    rows = sort_pairs(ids, num_experts)
    pair = rows.pair_of_row.long()
    expert = ids.flatten()[pair[:num_rows]]
    tokens = torch.randn(len(ids) * k + offset, device=DEVICE).to(dtype)[offset:].view(-1, k)
    x = tokens[pair // 2]
    x[num_rows:] = torch.nan
    term = None
    if rank:
        reduced = torch.randn(len(pair), rank, device=DEVICE).to(dtype)
        factor = torch.randn(num_experts, rank, n, device=DEVICE) * 0.1
        reduced[num_rows:] = torch.nan
        term = LowRankTerm(reduced, factor.transpose(1, 2))
    bias = torch.randn(num_experts, n, device=DEVICE) if has_bias else None
    tuned = specialized_tiles(heights, num_stages)
    operands = (
        Rows(tokens, rows.pair_of_row, 2) if is_gathered else Rows(x),
        weight,
        for_input_gradient,
        rows.ends,
        cut_tiles(rows, tuned.cut),
        tuned,
        term,
        bias,
    )
    out = grouped_gemm(*operands)
    if DEVICE.type == "cuda":
        assert torch.equal(out[:num_rows], grouped_gemm(*operands)[:num_rows]), "equal inputs give equal bits"
    else:
        assert out[num_rows:].isnan().all(), "rows without an expert are not written"
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
        ((256, 128), FourBitFormat("nf4", 128)),  # a block is longer than a step
        ((192, 64), FourBitFormat("fp4", 32)),  # as many steps as stages, and one step
        ((136, 264), Fp8Format()),  # a contraction that ends within a step in both orientations
        ((72, 352), Mxfp4Format()),
        ((128, 128), Fp8Format((1, 0))),
    ],
    ids=str,
)
def test_sizes(shape: tuple[int, int], storage: Format, num_stages: int, for_input_gradient: bool) -> None:
    dtype = DTYPES[num_stages % 2]
    error = product_error(storage, dtype, shape, for_input_gradient, heights=HEIGHTS[0], num_stages=num_stages)
    assert error <= LIMITS[dtype]


@pytest.mark.parametrize("for_input_gradient", [False, True])
@pytest.mark.parametrize("storage", [NF4, Fp8Format()], ids=str)
def test_eight_stages(storage: Format, for_input_gradient: bool) -> None:
    error = product_error(storage, DTYPES[0], (512, 512), for_input_gradient, heights=(128, 32), num_stages=8, rank=16)
    assert error <= LIMITS[DTYPES[0]]


@pytest.mark.parametrize("storage", [NF4, Nvfp4Format(), Fp8Format()], ids=str)
@pytest.mark.parametrize(
    ("heights", "rank", "wanted", "expected"),
    [
        # those in the table of compute capability 9.0
        ((256, 128, 32), 16, 4, {}),
        ((128, 32), 16, 8, {"nvfp4": 4}),
        ((160, 128, 32), 16, 4, {}),
        # as many as fit
        ((256, 128, 32), 256, 4, {}),
        ((256, 128, 32), 16, 8, {"nf4": 4, "nvfp4": 4, "e4m3": 4}),
        # more than 48 KiB, or the limit of the driver is not raised
        ((256, 128, 32), 0, 2, {}),
        ((32,), 0, 2, {"nf4": 8, "nvfp4": 8}),
        ((16,), 0, 4, {"nf4": 8, "nvfp4": 8}),
        # a stage is released after the wait for the next one
        ((256, 128, 32), 16, 1, {"nf4": 2, "nvfp4": 2, "e4m3": 2}),
    ],
    ids=str,
)
def test_number_of_stages(
    storage: Format, heights: tuple[int, ...], rank: int, wanted: int, expected: dict[str, int]
) -> None:
    """With the contraction along the columns, for which scales need more."""
    weight = packed_weight(random_stack((1, 512, 512), False, storage))
    own = codec.codec_of(weight, torch.bfloat16)
    shape = GemmShape(512, 512, heights, wanted, True, own, 0, 1, rank, (0, 0, 0), False)
    found = specialized_gemm._stages_that_fit(shape)
    assert found == expected.get("nvfp4" if isinstance(storage, Nvfp4Format) else storage.kernel_codes, wanted)


@pytest.mark.parametrize("is_gathered", [False, True])
@pytest.mark.parametrize("heights", [*HEIGHTS, (16,)], ids=str)
@pytest.mark.parametrize(
    "counts", [(300, 0, 129), (0, 0, 1, 0), (32, 64, 128), (0, 0), (161, 273, 545, 288, 160)], ids=str
)
def test_rows(counts: tuple[int, ...], heights: tuple[int, ...], is_gathered: bool) -> None:
    error = product_error(NF4, torch.float16, (136, 128), heights=heights, is_gathered=is_gathered, counts=counts)
    assert error <= LIMITS[torch.float16]


@pytest.mark.parametrize("for_input_gradient", [False, True])
@pytest.mark.parametrize("counts", [(700, 0, 30, 90), (290, 40), (0, 0)], ids=str)
def test_rows_together(counts: tuple[int, ...], for_input_gradient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """More, as many and fewer tiles of rows than go through the columns together."""
    monkeypatch.setattr(specialized_gemm, "WIDE_COLUMNS", 128)
    error = product_error(NF4, torch.float16, (320, 320), for_input_gradient, heights=(128, 64, 32), counts=counts)
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


@pytest.mark.parametrize("for_input_gradient", [False, True])
@pytest.mark.parametrize("rank", [4, 64])
@pytest.mark.parametrize(
    ("heights", "counts"), [((48, 32, 16), (33, 48, 49, 81)), ((160, 128, 32), (161, 140, 288))], ids=str
)
def test_low_rank_term_and_bias_of_a_second_part(
    heights: tuple[int, ...], counts: tuple[int, ...], rank: int, for_input_gradient: bool
) -> None:
    """A tile whose height is no power of two is multiplied in two parts."""
    dtype = DTYPES[for_input_gradient]
    error = product_error(
        NF4, dtype, (200, 64), for_input_gradient, heights=heights, counts=counts, rank=rank, has_bias=True
    )
    assert error <= LIMITS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize(("offset", "rank"), [(1, 16), (0, 3), (0, 255), (1, 256)])
@pytest.mark.parametrize("heights", [(256, 128, 32), (160, 128, 32)], ids=str)
def test_operands_of_the_other_kernel(offset: int, rank: int, heights: tuple[int, ...]) -> None:
    assert product_error(NF4, torch.bfloat16, heights=heights, rank=rank, offset=offset) <= 3.5e-3


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", [0, pytest.param(3, marks=pytest.mark.gpu), 4])
@pytest.mark.parametrize("heights", [(32,), (48, 32, 16)], ids=str)
def test_layer_and_all_gradients(
    heights: tuple[int, ...], rank: int, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp16, since Triton's interpreter does not compute in bf16. An odd rank takes the other kernel."""
    forget_recordings()  # tests change tiles, which recordings do not check
    monkeypatch.setattr(fused_steps, "choose_tiles", lambda *_: specialized_tiles(heights, 2))
    shapes = ((128, 64), (64, 64))
    up, down = (
        random_stack((3, *(shape[::-1] if transposed else shape)), transposed, storage)
        for shape, storage in zip(shapes, (NF4, Fp8Format()))
    )
    # on a GPU the second run replays the recording of the first, with other inputs and routing
    for _ in range(2 if DEVICE.type == "cuda" else 1):
        for found, expected in run_layer(40, 2, (up, down), Gate("silu"), rank, True, torch.float16):
            assert relative_error(found, expected) <= 1e-3


@pytest.mark.parametrize("storage", [NF4, Fp8Format()], ids=str)
def test_columns_in_another_order_are_noticed(storage: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cuda":
        pytest.skip("compiled kernels do not notice changes of their modules")

    @gluon.jit
    def column_of(row):
        return row

    for name, module in list(sys.modules.items()):
        if name.startswith("peft_moe_qlora.ops.kernels.") and hasattr(module, "column_of"):
            monkeypatch.setattr(module, "column_of", column_of)
    assert product_error(storage, torch.bfloat16) > 0.5
