"""Which tiles a grouped product is cut into, by what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ..cached_constant import cached_constant

_TABLES = Path(__file__).parent / "tables"


@dataclass(frozen=True)
class GemmTiles:
    """Shape of the tiles of a grouped product, and how it gets at a packed weight.

    Args:
        heights: numbers of rows, powers of two in descending order (`cut_tiles`).
        tile_n: columns of the result.
        tile_k: step along the contraction.
        num_warps: of 32 threads.
        num_stages: loads in flight.
        weight_left: compute the transposed product, in which the weight is the left operand.
        decode_first: decode into a 16-bit workspace and multiply from there, instead of inside the product.
    """

    heights: tuple[int, ...]
    tile_n: int
    tile_k: int
    num_warps: int
    num_stages: int
    weight_left: bool
    decode_first: bool


SAFE_TILES = GemmTiles(
    heights=(64, 16), tile_n=64, tile_k=32, num_warps=4, num_stages=2, weight_left=False, decode_first=True
)
"""For a GPU that nobody has measured, and for fp32: fits everywhere, and asks least of the compiler."""

SAFE_MOST_PAIRS = 16


@dataclass(frozen=True)
class TuningTable:
    """What was measured on one device.

    Args:
        device: its name.
        most_pairs_without_sorting: up to how many routed pairs a forward is faster pair by pair (`gemv`).
        entries: `(weight, along, up to this many rows per expert, tiles)`, where weight is a format's `kernel_codes`,
            `packed` for those that have no entries of their own, or `dense`, and along says whether the contraction
            runs along the stored `columns` or `rows`.
        like: `kernel_codes` that take the entries of others, which are of the same size.
    """

    device: str
    most_pairs_without_sorting: int
    entries: tuple[tuple[str, str, float, GemmTiles], ...]
    like: Mapping[str, str]

    def choose(self, codes: str | None, along_columns: bool, rows_per_expert: float) -> GemmTiles:
        """The tiles for weights of some `kernel_codes`, None for weights in 16 bits."""
        measured = {weight for weight, *_ in self.entries}
        codes = self.like.get(codes, codes)
        weight = "dense" if codes is None else codes if codes in measured else "packed"
        wanted = (weight, "columns" if along_columns else "rows")
        return next(
            tiles
            for weight, along, most_rows, tiles in self.entries
            if (weight, along) == wanted and rows_per_expert <= most_rows
        )


@cache
def tuning_table(capability: tuple[int, int]) -> TuningTable | None:
    """The measurements for a compute capability, None where there are none."""
    path = _TABLES / f"sm{capability[0]}{capability[1]}.json"
    if not path.exists():
        return None
    data = json.loads(path.read_text(encoding="utf-8"))
    entries = []
    for entry in data["entries"]:
        most_rows = entry["rows_per_expert"]
        tiles = GemmTiles(**{**entry["tiles"], "heights": tuple(entry["tiles"]["heights"])})
        entries.append((entry["weight"], entry["along"], float("inf") if most_rows is None else most_rows, tiles))
    return TuningTable(data["device"], data["most_pairs_without_sorting"], tuple(entries), data.get("like", {}))


@cache
def _table_of(device: torch.device, dtype: torch.dtype) -> TuningTable | None:
    """The measurements for a dtype on a device, None where the safe tiles are used."""
    is_measured = device.type == "cuda" and dtype.itemsize == 2
    return tuning_table(torch.cuda.get_device_capability(device)) if is_measured else None


@cached_constant
def tiles_origin(device: torch.device, dtype: torch.dtype) -> str:
    """Where the shapes of the kernels' tiles come from."""
    table = _table_of(device, dtype)
    return "safe tiles, nobody has measured this GPU and dtype" if table is None else f"tiles of {table.device}"


@cache
def choose_tiles(
    device: torch.device, dtype: torch.dtype, codes: str | None, along_columns: bool, rows_per_expert: float
) -> GemmTiles:
    """The tiles for one product; `rows_per_expert` is the mean, all that is known without asking the device."""
    table = _table_of(device, dtype)
    if table is None:
        return SAFE_TILES
    return table.choose(codes, along_columns, rows_per_expert)


@cached_constant
def most_pairs_without_sorting(device: torch.device, dtype: torch.dtype) -> int:
    """Up to how many routed pairs a forward goes pair by pair."""
    table = _table_of(device, dtype)
    return SAFE_MOST_PAIRS if table is None else table.most_pairs_without_sorting
