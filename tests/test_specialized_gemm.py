"""The product with specialized warps on a GPU of compute capability 9.0, and where it is chosen on any."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from experts_layer import run_layer
from kernel_cases import DEVICE, NF4, random_ids, random_stack, relative_error

from peft_moe_qlora.ops import Gate, fused_steps, packed_weight
from peft_moe_qlora.ops.kernels import specialized_gemm, specialized_support
from peft_moe_qlora.ops.kernels.gemm_operands import LowRankTerm, Rows
from peft_moe_qlora.ops.kernels.grouped_gemm import grouped_gemm
from peft_moe_qlora.ops.kernels.launch_recorder import forget_recordings
from peft_moe_qlora.ops.kernels.schedule import cut_tiles, sort_pairs
from peft_moe_qlora.ops.kernels.specialized_support import can_specialize, supports_specialized
from peft_moe_qlora.ops.kernels.tile_table import GemmTiles, TuningTable, parse_entries
from peft_moe_qlora.quantization import Format, FourBitFormat
from peft_moe_qlora.quantization.formats import Fp8Format, Int4Format, Int8Format, Mxfp4Format, Nvfp4Format

is_for_this_device = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="the kernel is for compute capability 9.0",
)
FORMATS = [
    NF4,
    FourBitFormat("nf4", 64, True),
    FourBitFormat("fp4", 32),
    FourBitFormat("nf4", 128),
    Fp8Format(),
    Fp8Format((1, 0)),
    Fp8Format((1, 32), "e8m0"),
    Int8Format(),
    Int4Format((1, 32), "bf16"),
    Int4Format((1, 128)),
    Mxfp4Format(),
    Nvfp4Format(),
]
LIMITS = {torch.bfloat16: 3.5e-3, torch.float16: 5e-4}
"""For weights and results rounded once each."""


def specialized(heights: tuple[int, ...] = (256, 128, 32), num_stages: int = 4) -> GemmTiles:
    return GemmTiles(heights, 128, 64, 8, num_stages, weight_left=True, decode_first=False, specialized=True)


def error_of_product(
    storage: Format,
    for_input_gradient: bool,
    dtype: torch.dtype = torch.bfloat16,
    n: int = 256,
    k: int = 512,
    rank: int = 16,
    has_bias: bool = False,
    is_gathered: bool = True,
    tuned: GemmTiles | None = None,
    num_tokens: int = 700,
    offset: int = 0,
) -> float:
    """Relative error against exact weights and sums in fp32; rows are `offset` elements behind an aligned address."""
    torch.manual_seed(0)
    tuned = tuned or specialized()
    experts, top_k = 5, 2
    stack = random_stack((experts, k, n) if for_input_gradient else (experts, n, k), False, storage, parts=1)
    weight = packed_weight(stack)
    routed = sort_pairs(random_ids(num_tokens, top_k, experts), experts)
    tiles = cut_tiles(routed, tuned.heights)
    num_rows = num_tokens if is_gathered else routed.pair_of_row.shape[0]
    x = (torch.randn(num_rows * k + offset, device=DEVICE) * 0.5).to(dtype)[offset:].view(num_rows, k)
    rows = Rows(x, routed.pair_of_row, top_k) if is_gathered else Rows(x)
    left = x[routed.pair_of_row.long() // top_k] if is_gathered else x
    term = bias = None
    if rank:
        term = LowRankTerm(
            torch.randn(left.shape[0], rank, device=DEVICE).to(dtype), torch.randn(experts, n, rank, device=DEVICE)
        )
    if has_bias:
        bias = torch.randn(experts, n, device=DEVICE)
    found = grouped_gemm(rows, weight, for_input_gradient, routed.ends, tiles, tuned, term, bias)
    assert torch.equal(
        found[: routed.ends[-1]],
        grouped_gemm(rows, weight, for_input_gradient, routed.ends, tiles, tuned, term, bias)[: routed.ends[-1]],
    )
    expected, start = torch.zeros_like(found, dtype=torch.float32), 0
    for expert, end in enumerate(routed.ends.tolist()):
        matrix = weight.decode_expert(expert, torch.float32)
        part = left[start:end].float() @ (matrix if for_input_gradient else matrix.T)
        if term is not None:
            part += term.reduced[start:end].float() @ term.factor[expert].to(dtype).float().T
        expected[start:end] = part if bias is None else part + bias[expert]
        start = end
    return relative_error(found[:start], expected[:start])


@pytest.mark.gpu
@is_for_this_device
@pytest.mark.parametrize("for_input_gradient", [False, True])
@pytest.mark.parametrize("storage", FORMATS, ids=str)
def test_formats(storage: Format, for_input_gradient: bool) -> None:
    assert error_of_product(storage, for_input_gradient) <= LIMITS[torch.bfloat16]


@pytest.mark.gpu
@is_for_this_device
@pytest.mark.parametrize("for_input_gradient", [False, True])
@pytest.mark.parametrize("rank", [0, 2, 4, 38, 64, 128])
def test_ranks(rank: int, for_input_gradient: bool) -> None:
    assert error_of_product(NF4, for_input_gradient, rank=rank, is_gathered=False) <= LIMITS[torch.bfloat16]


@pytest.mark.gpu
@is_for_this_device
@pytest.mark.parametrize("for_input_gradient", [False, True])
@pytest.mark.parametrize(("n", "k"), [(64, 64), (192, 320), (320, 192), (128, 1024)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ragged_sizes_and_bias(n: int, k: int, dtype: torch.dtype, for_input_gradient: bool) -> None:
    assert error_of_product(NF4, for_input_gradient, dtype, n, k, has_bias=True) <= LIMITS[dtype]
    assert error_of_product(Int8Format(), for_input_gradient, dtype, n + 8, k + 8) <= LIMITS[dtype]


@pytest.mark.gpu
@is_for_this_device
@pytest.mark.parametrize("heights", [(256,), (128, 64, 32), (16,)], ids=str)
@pytest.mark.parametrize("num_stages", [2, 3])
def test_heights_and_stages(heights: tuple[int, ...], num_stages: int) -> None:
    tuned = specialized(heights, num_stages)
    for num_tokens in (1, 40, 3000):
        assert error_of_product(NF4, False, tuned=tuned, num_tokens=num_tokens) <= LIMITS[torch.bfloat16]


@pytest.mark.gpu
@is_for_this_device
@pytest.mark.parametrize(("offset", "rank"), [(1, 16), (0, 3), (0, 255), (1, 256)])
def test_other_operands_are_multiplied_by_the_other_kernel(offset: int, rank: int) -> None:
    assert error_of_product(NF4, False, offset=offset, rank=rank) <= LIMITS[torch.bfloat16]


@pytest.mark.gpu
@is_for_this_device
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", [0, 3, 16])
def test_layer_and_all_gradients(rank: int, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run replays the launches of the first, with other inputs and routing."""
    forget_recordings()  # tests change tiles, which recordings do not check
    monkeypatch.setattr(fused_steps, "choose_tiles", lambda *_: specialized())
    shapes = ((256, 128), (128, 128))
    up, down = (
        random_stack((3, *(shape[::-1] if transposed else shape)), transposed, storage)
        for shape, storage in zip(shapes, (NF4, Fp8Format()))
    )
    for _ in range(2):
        for found, expected in run_layer(400, 2, (up, down), Gate("silu"), rank, True, torch.float16):
            assert relative_error(found, expected) <= 1e-3


@pytest.mark.parametrize(("offset", "rank", "suits"), [(0, 0, True), (0, 4, True), (1, 0, False), (0, 3, False)])
def test_operands_that_do_not_suit_the_kernel(
    offset: int, rank: int, suits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another kernel multiplies them, with tiles of the same heights."""
    calls = []
    monkeypatch.setattr(specialized_gemm, "specialized_gemm", lambda *operands: calls.append(operands))
    weight = packed_weight(random_stack((2, 32, 64), False, NF4))
    routed = sort_pairs(torch.zeros(8, 1, dtype=torch.long, device=DEVICE), 2)
    tuned = specialized((16,))
    x = torch.randn(8 * 64 + offset, device=DEVICE)[offset:].view(8, 64)
    term = LowRankTerm(torch.randn(8, rank, device=DEVICE), torch.randn(2, 32, rank, device=DEVICE)) if rank else None
    assert can_specialize(Rows(x), weight, term) is suits
    tiles = cut_tiles(routed, tuned.heights)
    found = grouped_gemm(Rows(x), weight, False, routed.ends, tiles, tuned, term)
    assert len(calls) == suits
    if not suits:
        expected = x @ weight.decode_expert(0, torch.float32).T
        expected += 0 if term is None else term.reduced @ term.factor[0].T
        assert relative_error(found, expected) <= 1e-5


def test_only_supported_products_are_specialized(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not supports_specialized(torch.device("cpu"), torch.bfloat16, "nf4", 128, 128)
    monkeypatch.setattr(specialized_support, "_runs_on", lambda device: True)
    product = (torch.device("cpu"), torch.bfloat16, "nf4", 128, 128)
    assert supports_specialized(*product)
    assert not supports_specialized(*product[:2], None, 128, 128), "16-bit weights, and blocks that are no grid"
    assert not supports_specialized(product[0], torch.float32, *product[2:])
    assert not supports_specialized(*product[:3], 132, 128)
    assert not supports_specialized(*product[:3], 128, 132)


@pytest.mark.parametrize(("version", "is_known"), [("3.6.0", True), ("3.9.1", True), ("3.10.0.dev1", False)])
def test_versions_of_triton(version: str, is_known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specialized_support.triton, "__version__", version)
    monkeypatch.setattr(specialized_support, "runs_ptx", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    specialized_support._runs_on.cache_clear()
    assert supports_specialized(torch.device("cuda", 0), torch.float16, "nf4", 128, 128) is is_known
    specialized_support._runs_on.cache_clear()


def test_other_tiles_are_chosen_where_the_kernel_does_not_run() -> None:
    entries = [
        {
            "weight": "packed",
            "along": "columns",
            "rows_per_expert": None,
            "tiles": {**tuned.__dict__, "heights": list(tuned.heights)},
        }
        for tuned in (specialized(), GemmTiles((64, 16), 64, 64, 4, 3, False, False))
    ]
    table = TuningTable("", 0, parse_entries(entries), {})
    question = ("nf4", True, 256.0, 128, 128)
    assert table.choose(*question, may_specialize=True).specialized
    assert not table.choose(*question).specialized
