"""Shared by the kernel tests: inputs, tile sizes and the comparison."""

from __future__ import annotations

import torch

from peft_moe_qlora.ops import Gate
from peft_moe_qlora.ops.kernels.tuning import SAFE_TILES, GemmTiles
from peft_moe_qlora.quantization import DenseStack, Format, FourBitFormat, QuantizedStack, Stack
from peft_moe_qlora.quantization.formats import Fp8Format, Int4Format, Int8Format, Mxfp4Format, Nvfp4Format

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = 1e-5  # relative L2 error, fp32 against fp32

NF4 = FourBitFormat("nf4", 64)
GRIDS = [
    Fp8Format((16, 32)),
    Fp8Format((24, 32), "bf16"),
    Fp8Format((1, 0)),
    Fp8Format((0, 0), "fp16"),
    Fp8Format((1, 32), "e8m0"),
    Fp8Format(),
    Mxfp4Format(),
    Int8Format(),
    Int8Format((24, 32), "bf16"),
    Int4Format((1, 32), "bf16"),
    Int4Format((1, 128)),
    Nvfp4Format(),
    Nvfp4Format(is_inverse=True),
]
"""Formats whose scales form a two-dimensional grid."""
GATES = [
    Gate("silu"),
    Gate("silu", interleaved=True),
    Gate("gelu_tanh"),
    Gate("clamped_silu", limit=0.5),
    Gate("swiglu_oai", interleaved=True, limit=0.7, alpha=1.702),
    Gate("swiglu_oai", limit=0.7, alpha=1.702),
]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def assert_close(found: torch.Tensor, expected: torch.Tensor, limit: float = TOLERANCE) -> None:
    assert found.shape == expected.shape
    error = relative_error(found, expected)
    assert error <= limit, f"relative error {error:.1e}"


def random_stack(
    shape: tuple[int, int, int], transposed: bool, storage: Format | None, parts: int | None = None
) -> Stack:
    """Gate and up are fused if possible, unless `parts` is given."""
    weight = torch.randn(shape, device=DEVICE) * 0.2
    if storage is None:
        return DenseStack(weight, transposed)
    if parts is None:
        parts = 1 + (shape[2 if transposed else 1] % 2 == 0)
    return QuantizedStack.from_dense(weight, transposed, storage, parts)


def random_ids(num_tokens: int, top_k: int, num_experts: int) -> torch.Tensor:
    """Distinct ids per token. The first expert is never chosen; `num_experts` is the id of experts on other ranks."""
    if num_experts == 1:
        return torch.zeros(num_tokens, top_k, dtype=torch.long, device=DEVICE)
    scores = torch.rand(num_tokens, num_experts, device=DEVICE)
    return torch.topk(scores, top_k).indices + 1


TILES = [
    GemmTiles((32, 16), 32, 64, 4, 2, weight_left=False, decode_first=False),
    GemmTiles((16,), 64, 32, 4, 2, weight_left=True, decode_first=False),
    GemmTiles((32, 16), 32, 64, 4, 2, weight_left=True, decode_first=True),
    SAFE_TILES,
]


def specialized_tiles(heights: tuple[int, ...], num_stages: int) -> GemmTiles:
    """Tiles of the kernel with specialized warps."""
    return GemmTiles(heights, 128, 64, 8, num_stages, weight_left=True, decode_first=False, specialized=True)
