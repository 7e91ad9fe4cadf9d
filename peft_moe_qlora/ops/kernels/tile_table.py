"""Tables of measured tiles: entries, parsing, and look-up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

MOST_SPECIALIZED_ROWS = 256
"""Most rows of one product of specialized warps, whose accumulators fill the registers."""


class Cut(NamedTuple):
    """How rows are divided into tiles.

    Args:
        heights: heights of tiles in descending order. Tiles have the height `tile_step`; the last one of an expert has
            the smallest that fits.
        highest_first: order tiles by height, then by expert, instead of by expert alone. If each of P programs
            computes every P-th tile, programs then finish at about the same time.
    """

    heights: tuple[int, ...]
    highest_first: bool = False


@dataclass(frozen=True)
class GemmTiles:
    """Shape of the tiles of a grouped product, and its way of decoding a packed weight.

    Args:
        heights: numbers of rows, powers of two in descending order (`cut_tiles`). With specialized warps, the first
            may be the sum of the second and a smaller power of two.
        tile_n: number of columns of the result.
        tile_k: step size along the contraction.
        num_warps: number of warps of 32 threads.
        num_stages: number of loads in flight.
        weight_left: compute the transposed product, in which the weight is the left operand.
        decode_first: decode into a 16-bit workspace before the product, instead of inside the product.
        specialized: use the kernel of `specialized_gemm`, of which only heights and stages vary.
    """

    heights: tuple[int, ...]
    tile_n: int
    tile_k: int
    num_warps: int
    num_stages: int
    weight_left: bool
    decode_first: bool
    specialized: bool = False

    @property
    def cut(self) -> Cut:
        """How rows are divided into these tiles."""
        return Cut(self.heights, highest_first=self.specialized)

    @property
    def for_the_other_kernel(self) -> GemmTiles:
        """Tiles for a product that the kernel with specialized warps cannot compute; they fit into shared memory."""
        heights = self.heights[1:] if self.heights[0] > tile_step(self.heights) else self.heights
        return replace(self, heights=heights, tile_n=64, num_stages=3, specialized=False)


def tile_step(heights: tuple[int, ...]) -> int:
    """Rows of a tile that is followed by another one: the largest power of two up to the first height.

    If the first height is no power of two, a tile with that height takes the place of one of `tile_step` rows and a
    low one, which would take more time than its share of rows.
    """
    return 1 << (heights[0].bit_length() - 1)


class Entry(NamedTuple):
    """The best tiles for one kind of product.

    Args:
        weight: a format's `kernel_codes`, `packed` for formats without own entries, or `dense`.
        along: whether the contraction is along the stored `columns` or `rows`.
        most_rows: largest number of rows per expert.
        tiles: the best tiles.
        least_rows: smallest number of rows per expert.
        n: columns of the measured result; None for an entry that applies to any shape.
        k: length of the measured contraction; None for an entry that applies to any shape.
    """

    weight: str
    along: str
    most_rows: float
    tiles: GemmTiles
    least_rows: float = 0.0
    n: int | None = None
    k: int | None = None

    def holds_for(self, rows_per_expert: float) -> bool:
        return self.least_rows <= rows_per_expert <= self.most_rows

    def suits(self, n: int | None, k: int | None) -> bool:
        """Whether the tiles may be used for a shape.

        With specialized warps, only as measured or if the contraction consists of whole rings of stages; the code for
        others differs from what was measured.
        """
        if not self.tiles.specialized or (self.n, self.k) == (n, k):
            return True
        return k is not None and k % (self.tiles.tile_k * self.tiles.num_stages) == 0

    def distance(self, n: int, k: int) -> float:
        """Distance of another shape from the measured one: sum of the absolute logarithms of both ratios."""
        return abs(math.log(n / self.n)) + abs(math.log(k / self.k))


NEAR = math.log(4)
"""Distance beyond which entries for any shape have precedence."""


@dataclass(frozen=True)
class TuningTable:
    """Measurements on one device.

    Args:
        device: name of the device.
        most_pairs_without_sorting: largest number of routed pairs for which a forward pair by pair (`gemv`) is faster.
        entries: entries in the order of their rows; of equally near shapes, the first is used.
        like: `kernel_codes` -> `kernel_codes` of the same size whose entries they use.
        origin: origin of the tiles, for the report.
    """

    device: str
    most_pairs_without_sorting: int
    entries: tuple[Entry, ...]
    like: Mapping[str, str]
    origin: str = ""

    def choose(
        self,
        codes: str | None,
        along_columns: bool,
        rows_per_expert: float,
        n: int | None = None,
        k: int | None = None,
        may_specialize: bool = False,
    ) -> GemmTiles | None:
        """The tiles for weights with these `kernel_codes`, or for 16-bit weights if `codes` is None.

        Entries for the kernel with specialized warps are searched only with `may_specialize`.

        Searches entries for these codes, then for similar ones: the nearest measured shape, unless it is too far, else
        an entry for any shape, else the nearest shape at any distance. Returns None if there is no entry for this
        number of rows.
        """
        kinds = ["dense"] if codes is None else dict.fromkeys((codes, self.like.get(codes, codes), "packed"))
        along = "columns" if along_columns else "rows"
        far = None
        for kind in kinds:
            fitting = [
                entry
                for entry in self.entries
                if (entry.weight, entry.along) == (kind, along)
                and entry.holds_for(rows_per_expert)
                and (may_specialize or not entry.tiles.specialized)
                and entry.suits(n, k)
            ]
            shaped = [entry for entry in fitting if entry.n is not None]
            if n is not None and k is not None and shaped:
                nearest = min(shaped, key=lambda entry: entry.distance(n, k))
                if nearest.distance(n, k) <= NEAR:
                    return nearest.tiles
                far = far or nearest.tiles
            plain = next((entry.tiles for entry in fitting if entry.n is None), None)
            if plain is not None:
                return plain
        return far


def parse_entries(entries: list[dict[str, Any]]) -> tuple[Entry, ...]:
    """Parses entries from JSON.

    Raises:
        ValueError: an entry is not valid for the kernels; the error names it.
    """
    found = []
    for number, entry in enumerate(entries):
        try:
            found.append(_parse_entry(entry))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"entry {number} is not a valid entry of a tile table ({type(error).__name__}: {error})"
            ) from error
    return tuple(found)


def _parse_entry(entry: dict[str, Any]) -> Entry:
    most_rows = entry["rows_per_expert"]
    parsed = Entry(
        entry["weight"],
        entry["along"],
        math.inf if most_rows is None else float(most_rows),
        _parse_tiles(entry["tiles"]),
        float(entry.get("from_rows_per_expert", 0)),
        entry.get("n"),
        entry.get("k"),
    )
    if parsed.along not in ("columns", "rows"):
        raise ValueError(f"expected along='columns' or 'rows', found {parsed.along!r}")
    if (parsed.n is None) != (parsed.k is None) or any(
        size is not None and not _is_count(size) for size in (parsed.n, parsed.k)
    ):
        raise ValueError(f"n={parsed.n!r} and k={parsed.k!r} are not both sizes")
    return parsed


def _parse_tiles(values: dict[str, Any]) -> GemmTiles:
    tiles = GemmTiles(**{**values, "heights": tuple(values["heights"])})
    heights = tiles.heights
    if tiles.specialized is True and heights[1:] and all(map(_is_count, heights)) and heights[1] == tile_step(heights):
        heights = (*heights[1:], heights[0] - heights[1])
    sizes = (*heights, tiles.tile_n, tiles.tile_k)
    if not tiles.heights or not all(_is_count(size) and size >= 16 and size & (size - 1) == 0 for size in sizes):
        raise ValueError(f"sizes {sizes} are not all powers of two of at least 16")
    if tiles.specialized and heights[0] > MOST_SPECIALIZED_ROWS:
        raise ValueError(f"heights {tiles.heights} have more than {MOST_SPECIALIZED_ROWS} rows for specialized warps")
    if list(tiles.heights) != sorted(set(tiles.heights), reverse=True):
        raise ValueError(f"heights {tiles.heights} are not in descending order")
    if tiles.num_warps not in (1, 2, 4, 8, 16) or not _is_count(tiles.num_stages):
        raise ValueError(f"num_warps={tiles.num_warps!r} or num_stages={tiles.num_stages!r} is not valid")
    for field in fields(GemmTiles):
        if field.type == "bool" and not isinstance(getattr(tiles, field.name), bool):
            raise ValueError(f"expected a bool, found {field.name}={getattr(tiles, field.name)!r}")
    return tiles


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0
