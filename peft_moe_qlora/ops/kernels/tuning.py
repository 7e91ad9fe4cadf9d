"""Chooses the tiles of a grouped product from the user's measurements or the tables of this package."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch

from ..cached_constant import cached_constant
from .launch_recorder import forget_recordings
from .tile_table import GemmTiles, TuningTable, parse_entries
from .user_table import Gpu, read_user_table

_TABLES = Path(__file__).parent / "tables"

SAFE_TILES = GemmTiles(
    heights=(64, 16), tile_n=64, tile_k=32, num_warps=4, num_stages=2, weight_left=False, decode_first=True
)
"""Tiles for GPUs without measurements and for fp32; they fit on every supported GPU."""

SAFE_MOST_PAIRS = 16


@cache
def tuning_table(capability: tuple[int, int]) -> TuningTable | None:
    """The package's measurements for a compute capability; None if there are none."""
    path = _TABLES / f"sm{capability[0]}{capability[1]}.json"
    if not path.exists():
        return None
    data = json.loads(path.read_text(encoding="utf-8"))
    origin = data.get("origin", f"tiles of {data['device']}")
    entries = parse_entries(data["entries"])
    return TuningTable(data["device"], data["most_pairs_without_sorting"], entries, data.get("like", {}), origin)


def gpu_of(device: torch.device) -> Gpu:
    """The GPU and the version of the compiler, on which tiles depend."""
    import triton  # installed only with torch for GPUs

    return Gpu(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device), triton.__version__)


@cache
def _table_of(device: torch.device, dtype: torch.dtype) -> TuningTable | None:
    """The measurements for a dtype on a device, the user's before the package's; None if there are none."""
    if device.type != "cuda" or dtype.itemsize != 2:
        return None
    gpu = gpu_of(device)
    shipped, own = tuning_table(gpu.capability), read_user_table(gpu)
    if own is None:
        return shipped
    if shipped is None:
        return TuningTable(gpu.device, SAFE_MOST_PAIRS, own.entries, {}, own.origin(gpu.device))
    origin = f"{own.origin(gpu.device)}; else {shipped.origin}"
    return TuningTable(
        gpu.device, shipped.most_pairs_without_sorting, own.entries + shipped.entries, shipped.like, origin
    )


@cached_constant
def tiles_origin(device: torch.device, dtype: torch.dtype) -> str:
    """Origin of the kernels' tiles."""
    table = _table_of(device, dtype)
    return "default tiles, this GPU and dtype are not tuned" if table is None else table.origin


@cache
def choose_tiles(
    device: torch.device,
    dtype: torch.dtype,
    codes: str | None,
    along_columns: bool,
    rows_per_expert: float,
    n: int | None = None,
    k: int | None = None,
    may_specialize: bool = False,
) -> GemmTiles:
    """The tiles for one product.

    Args:
        device: device of the product.
        dtype: dtype of the activations.
        codes: `kernel_codes` of the weight; None for 16 bits.
        along_columns: whether the contraction is along the stored columns.
        rows_per_expert: mean number of rows, which is known without a copy to the host.
        n: columns of the result.
        k: length of the contraction.
        may_specialize: whether the kernel with specialized warps supports the product.
    """
    table = _table_of(device, dtype)
    tiles = None if table is None else table.choose(codes, along_columns, rows_per_expert, n, k, may_specialize)
    return SAFE_TILES if tiles is None else tiles


@cached_constant
def most_pairs_without_sorting(device: torch.device, dtype: torch.dtype) -> int:
    """Largest number of routed pairs that a forward computes pair by pair (`gemv`)."""
    table = _table_of(device, dtype)
    return SAFE_MOST_PAIRS if table is None else table.most_pairs_without_sorting


def forget_tables() -> None:
    """Clears cached tables, and the recordings of launches made with their tiles."""
    for function in (tuning_table, _table_of, tiles_origin, choose_tiles, most_pairs_without_sorting):
        function.cache_clear()
    forget_recordings()
