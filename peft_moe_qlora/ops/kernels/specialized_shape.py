"""What the copying and the multiplying warps of `specialized_gemm` share: sizes, places in shared memory, tiles."""

from __future__ import annotations

from dataclasses import dataclass

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .byte_table import TABLE_BYTES
from .codec import Codec
from .gemm_operands import padded_rank
from .left_operand import GROUP_N, PAIRS, STEP_K
from .tile_table import tile_step

TILE_N = tl.constexpr(2 * GROUP_N.value)
"""Columns of a tile, of which each group of multiplying warps has one half."""
COPY_WARPS = tl.constexpr(4)


@dataclass(frozen=True)
class GemmShape:
    """The product of rows and a packed weight, as one constexpr argument of a kernel.

    Args:
        n: columns of the result.
        k: length of the contraction.
        heights: heights of the tiles of rows, see `Tiles`. If the first is no power of two, tiles of that height are
            computed in two parts, of `step_rows` and `extra_rows`, which share the decoded weights.
        stages: number of stages in shared memory.
        along_columns: whether the contraction is along the stored columns.
        codec: decoding of the weight.
        top_k: experts per token if rows are gathered from tokens; 0 if they are sorted.
        rows_together: number of tiles of rows that go through the columns together.
        rank: rank of the low-rank term; 0 without one.
        factor_strides: strides of its factor: expert, column of the result, rank.
        has_bias: whether there is a bias.
    """

    n: int
    k: int
    heights: tuple[int, ...]
    stages: int
    along_columns: bool
    codec: Codec
    top_k: int
    rows_together: int
    rank: int
    factor_strides: tuple[int, int, int]
    has_bias: bool

    @property
    def cache_key(self) -> str:
        """Part of the key of compiled kernels in Triton's on-disk cache."""
        return f"{self!r}-{self.codec.cache_key}"

    @property
    def tiles_n(self) -> int:
        """Tiles along the columns of the result."""
        return -(-self.n // TILE_N.value)

    @property
    def steps(self) -> int:
        """Steps along the contraction."""
        return -(-self.k // STEP_K.value)

    @property
    def step_rows(self) -> int:
        """Rows of a tile in the main part of a stage."""
        return tile_step(self.heights)

    @property
    def extra_rows(self) -> int:
        """Rows in the second part of a stage; 0 without one."""
        return self.heights[0] - self.step_rows

    @property
    def unrolls(self) -> bool:
        """Whether tiles consist of whole rings, so that the stages of an iteration are constants."""
        return self.k % (STEP_K.value * self.stages) == 0

    @property
    def steps_at_once(self) -> int:
        """Steps of one iteration of the main loop."""
        return self.stages if self.unrolls else 1

    @property
    def is_ragged_k(self) -> bool:
        """Whether the last step exceeds the contraction."""
        return self.k % STEP_K.value != 0

    @property
    def is_ragged_n(self) -> bool:
        """Whether the last tile exceeds the columns of the result."""
        return self.n % TILE_N.value != 0

    @property
    def rows(self) -> int:
        """Rows of a matrix as stored."""
        return self.n if self.along_columns else self.k

    @property
    def columns(self) -> int:
        """Columns of a matrix as stored."""
        return self.k if self.along_columns else self.n

    @property
    def word_bytes(self) -> int:
        """Bytes of the integers in which codes are copied and loaded."""
        return 4 if self.along_columns else 2 * self.codec.pair_bytes

    @property
    def words(self) -> int:
        """Words of codes in a row of a matrix."""
        return self.columns // 2 * self.codec.pair_bytes // self.word_bytes

    @property
    def code_rows(self) -> int:
        """Rows of codes in a stage."""
        return TILE_N.value if self.along_columns else STEP_K.value

    @property
    def code_words(self) -> int:
        """Words in a row of codes in a stage."""
        pairs = PAIRS.value if self.along_columns else 2 * PAIRS.value
        return pairs * self.codec.pair_bytes // self.word_bytes

    @property
    def blocks(self) -> int:
        """Blocks with a scale each in a row of codes in a stage."""
        return max(1, (STEP_K if self.along_columns else TILE_N).value // self.codec.block_columns)

    @property
    def scale_lines(self) -> int:
        """Lines of the `scale_parts` of a stage."""
        return self.code_rows if self.along_columns else self.code_rows // 2

    @property
    def stage_bytes(self) -> int:
        """Shared memory of a stage, without barriers."""
        rows = self.heights[0] * STEP_K.value * 2
        codes = self.code_rows * self.code_words * self.word_bytes
        return rows + codes + self.scale_lines * self.blocks * 8

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a program, without that of its results and barriers."""
        reduced = self.heights[0] * self.ranks_at_once * 2 if self.has_low_rank else 0
        table = TABLE_BYTES if self.codec.has_byte_pairs else 0
        return self.stages * self.stage_bytes + reduced + table

    @property
    def has_low_rank(self) -> bool:
        return self.rank > 0

    @property
    def padded_rank(self) -> int:
        return padded_rank(self.rank)

    @property
    def ranks_at_once(self) -> int:
        """Ranks of the low-rank term in shared memory."""
        return min(self.padded_rank, 32)

    @property
    def loads_factor_early(self) -> bool:
        """Whether the factor fits into registers during the main loop."""
        return self.has_low_rank and self.padded_rank == 16


@gluon.constexpr_function
def _shared_codes_layout(words, word_bytes):
    """Shared memory of codes, swizzled so that the reads of `load_codes` have no bank conflicts."""
    chunk, line = 16 // word_bytes, 128 // word_bytes
    return gl.SwizzledSharedLayout(chunk, max(1, line // words), min(8, words // chunk), [1, 0])


@gluon.constexpr_function
def _right_layout(length):
    """Shared memory of rows that are a right operand, `(rows, length)`."""
    return gl.NVMMASharedLayout(swizzle_byte_width=2 * length, element_bitwidth=16)


@gluon.jit
def allocate_ring(SHAPE: tl.constexpr, DTYPE: tl.constexpr):
    """Stages in shared memory, and barriers for full and empty ones.

    Returns rows, a tuple of `(stages, height, STEP_K)` for each part of the tiles, codes `(stages, code_rows,
    code_words)` in integers of `word_bytes`, `scale_parts` `(stages, scale_lines, blocks, 2)` int32, and the barriers
    `(stages, 1)`.
    """
    STAGES: tl.constexpr = SHAPE.stages
    CODES_LAYOUT: tl.constexpr = _shared_codes_layout(SHAPE.code_words, SHAPE.word_bytes)
    PARTS_LAYOUT: tl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 0, 1])
    x = (gl.allocate_shared_memory(DTYPE, [STAGES, SHAPE.step_rows, STEP_K], _right_layout(STEP_K)),)
    if SHAPE.extra_rows > 0:
        extra = gl.allocate_shared_memory(DTYPE, [STAGES, SHAPE.extra_rows, STEP_K], _right_layout(STEP_K))
        x = x + (extra,)  # noqa: RUF005 - kernels cannot unpack
    WORD: tl.constexpr = tl.int32 if SHAPE.word_bytes == 4 else tl.int16
    codes = gl.allocate_shared_memory(WORD, [STAGES, SHAPE.code_rows, SHAPE.code_words], CODES_LAYOUT)
    parts = gl.allocate_shared_memory(tl.int32, [STAGES, SHAPE.scale_lines, SHAPE.blocks, 2], PARTS_LAYOUT)
    full = gl.allocate_shared_memory(tl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(tl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        # an arrival of each copying thread when its copies are there, and one for the scales
        mbarrier.init(full.index(stage), 32 * COPY_WARPS + 1)
        mbarrier.init(empty.index(stage), 2)
    return x, codes, parts, full, empty


@gluon.jit
def allocate_reduced(SHAPE: tl.constexpr, DTYPE: tl.constexpr):
    """Shared memory of rows of the low-rank term, and barriers for full and empty.

    The rows are a tuple of `(height, ranks_at_once)` for each part of the tiles.
    """
    WIDTH: tl.constexpr = SHAPE.ranks_at_once
    reduced = (gl.allocate_shared_memory(DTYPE, [SHAPE.step_rows, WIDTH], _right_layout(WIDTH)),)
    if SHAPE.extra_rows > 0:
        extra = gl.allocate_shared_memory(DTYPE, [SHAPE.extra_rows, WIDTH], _right_layout(WIDTH))
        reduced = reduced + (extra,)  # noqa: RUF005 - as above
    full = gl.allocate_shared_memory(tl.int64, [1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(tl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, 32 * COPY_WARPS)
    mbarrier.init(empty, 2)
    return reduced, full, empty


@gluon.constexpr_function
def parts_of(height):
    """Numbers of rows that are multiplied at once: the height, or the largest power of two in it and the rest."""
    step = 1 << (height.bit_length() - 1)  # `tile_step`
    return (step, height - step) if height > step else (step,)


@gluon.jit
def stage_of(count, inner: tl.constexpr, SHAPE: tl.constexpr):
    """Stage and phase of a step; `count` is the number of iterations with `GemmShape.steps_at_once` steps each."""
    if SHAPE.unrolls:
        return inner, count & 1
    else:
        STAGES: tl.constexpr = SHAPE.stages
        return count % STAGES, count // STAGES & 1


@gluon.jit
def stage_before(count, SHAPE: tl.constexpr):
    """Stage of the last step before an iteration."""
    if SHAPE.unrolls:
        return SHAPE.stages - 1
    else:
        STAGES: tl.constexpr = SHAPE.stages
        return (count + STAGES - 1) % STAGES


@gluon.jit
def find_tile(index, end, TILES, ENDS, bound, SHAPE: tl.constexpr):
    """Expert, first row, end of the expert's rows, index of the height, and place among the columns of a tile.

    Past the last tile, those of some valid one.
    """
    TILES_N: tl.constexpr = SHAPE.tiles_n
    TOGETHER: tl.constexpr = SHAPE.rows_together
    index = gl.minimum(index, gl.maximum(end - 1, 0))
    first = index // (TOGETHER * TILES_N) * TOGETHER
    place = index % (TOGETHER * TILES_N)
    if TOGETHER == 1:
        tile, tile_n = first, place
    else:
        count = gl.maximum(gl.minimum(end // TILES_N - first, TOGETHER), 1)
        tile, tile_n = first + place % count, place // count
    expert = gl.maximum(gl.load(TILES + tile), 0)
    start, height = gl.load(TILES + bound + tile), gl.load(TILES + 2 * bound + tile)
    return expert, start, gl.load(ENDS + expert), height, tile_n
