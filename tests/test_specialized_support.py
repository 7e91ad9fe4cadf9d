"""Where the kernel with specialized warps is chosen, and what it leaves to the other kernel."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from kernel_cases import DEVICE, NF4, random_stack, relative_error, specialized_tiles

from peft_moe_qlora.ops import packed_weight
from peft_moe_qlora.ops.kernels import specialized_gemm, specialized_support
from peft_moe_qlora.ops.kernels.gemm_operands import LowRankTerm, Rows
from peft_moe_qlora.ops.kernels.grouped_gemm import grouped_gemm
from peft_moe_qlora.ops.kernels.launch import launch
from peft_moe_qlora.ops.kernels.schedule import cut_tiles, sort_pairs
from peft_moe_qlora.ops.kernels.specialized_support import can_specialize, supports_specialized
from peft_moe_qlora.ops.kernels.tile_table import GemmTiles, TuningTable, parse_entries


@pytest.mark.parametrize(("offset", "rank", "suits"), [(0, 0, True), (0, 4, True), (1, 0, False), (0, 3, False)])
def test_operands_that_do_not_suit_the_kernel(
    offset: int, rank: int, suits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another kernel multiplies them, with heights that are powers of two."""
    calls, heights = [], []
    monkeypatch.setattr(specialized_gemm, "specialized_gemm", lambda *operands: calls.append(operands))

    def recorded(*operands: object, **options: object) -> None:
        heights.append(options["HEIGHTS"])
        launch(*operands, **options)

    monkeypatch.setattr("peft_moe_qlora.ops.kernels.grouped_gemm.launch", recorded)
    weight = packed_weight(random_stack((2, 32, 64), False, NF4))
    routed = sort_pairs(torch.zeros(70, 1, dtype=torch.long, device=DEVICE), 2)
    tuned = specialized_tiles((48, 32, 16), 2)
    x = torch.randn(70 * 64 + offset, device=DEVICE)[offset:].view(70, 64)
    term = LowRankTerm(torch.randn(70, rank, device=DEVICE), torch.randn(2, 32, rank, device=DEVICE)) if rank else None
    assert can_specialize(Rows(x), weight, term) is suits
    tiles = cut_tiles(routed, tuned.cut)
    found = grouped_gemm(Rows(x), weight, False, routed.ends, tiles, tuned, term)
    assert len(calls) == suits
    assert heights == ([] if suits else [(32, 16)])
    if not suits:
        expected = x @ weight.decode_expert(0, torch.float32).T
        expected += 0 if term is None else term.reduced @ term.factor[0].T
        assert relative_error(found, expected) <= 1e-5


def test_only_supported_products_are_specialized(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not supports_specialized(torch.device("cpu"), torch.bfloat16, "nf4", 128, 128, 16)
    monkeypatch.setattr(specialized_support, "_runs_on", lambda device: True)
    product = (torch.device("cpu"), torch.bfloat16, "nf4", 128, 128)
    assert supports_specialized(*product, 16)
    assert supports_specialized(*product, 0)
    assert not supports_specialized(*product[:2], None, 128, 128, 16), "16-bit weights, and blocks that are no grid"
    assert not supports_specialized(product[0], torch.float32, *product[2:], 16)
    assert not supports_specialized(*product[:3], 132, 128, 16)
    assert not supports_specialized(*product[:3], 128, 132, 16)
    assert not supports_specialized(*product, 15)


@pytest.mark.parametrize(("version", "is_known"), [("3.6.0", True), ("3.9.1", True), ("3.10.0.dev1", False)])
def test_versions_of_triton(version: str, is_known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specialized_support.triton, "__version__", version)
    monkeypatch.setattr(specialized_support, "runs_ptx", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    specialized_support._runs_on.cache_clear()
    assert supports_specialized(torch.device("cuda", 0), torch.float16, "nf4", 128, 128, 16) is is_known
    specialized_support._runs_on.cache_clear()


def test_other_tiles_are_chosen_where_the_kernel_does_not_run() -> None:
    entries = [
        {
            "weight": "packed",
            "along": "columns",
            "rows_per_expert": None,
            "tiles": {**tuned.__dict__, "heights": list(tuned.heights)},
        }
        for tuned in (specialized_tiles((64, 16), 4), GemmTiles((64, 16), 64, 64, 4, 3, False, False))
    ]
    table = TuningTable("", 0, parse_entries(entries), {})
    question = ("nf4", True, 256.0, 512, 512)
    assert table.choose(*question, may_specialize=True).specialized
    assert not table.choose(*question).specialized
