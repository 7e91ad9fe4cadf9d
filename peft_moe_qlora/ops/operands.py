"""Operands of the kernels besides activations: weights, low-rank factors and gates."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from ..quantization import DenseStack, Format, QuantizedStack, Stack, parse_format


class PackedWeight(NamedTuple):
    """Tensors and properties of a stack for kernels.

    Args:
        tensors: tensors of the format in order, or only the 16-bit weight.
        rows: rows of one expert's matrix as stored.
        columns: columns of one expert's matrix as stored.
        is_transposed: whether matrices are stored `(in, out)`.
        storage: the format; None if the weight is not packed.
        parts: number of matrices concatenated along the rows.
        storage_name: name of the format, precomputed since torch.compile cannot format numbers into strings.
    """

    tensors: tuple[torch.Tensor, ...]
    rows: int
    columns: int
    is_transposed: bool
    storage: Format | None
    parts: int = 1
    storage_name: str = ""

    @property
    def num_experts(self) -> int:
        return self.tensors[0].shape[0]

    def decode_expert(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """`(rows, columns)` weights of one expert, decoded with torch."""
        if self.storage is None:
            return self.tensors[0][expert].to(dtype)
        names = self.storage.tensors(self.rows, self.columns, self.parts)
        tensors = {name: tensor[expert : expert + 1] for name, tensor in zip(names, self.tensors)}
        return self.storage.dequantize(tensors, self.rows, self.columns, dtype, self.parts)[0]

    @property
    def flat_shape(self) -> list[int]:
        """The integer fields, as an argument of a custom operator; see `from_flat`."""
        return [self.rows, self.columns, int(self.is_transposed), self.parts]

    @classmethod
    def from_flat(cls, tensors: list[torch.Tensor], flat_shape: list[int], storage_name: str) -> PackedWeight:
        """Creates a weight from the arguments of a custom operator."""
        rows, columns, is_transposed, parts = flat_shape
        storage = parse_format(storage_name) if storage_name else None
        return cls(tuple(tensors), rows, columns, bool(is_transposed), storage, parts, storage_name)

    @property
    def in_features(self) -> int:
        return self.rows if self.is_transposed else self.columns

    @property
    def out_features(self) -> int:
        return self.columns if self.is_transposed else self.rows

    def contracts_columns(self, for_input_gradient: bool) -> bool:
        """Whether the contraction of a product is along the stored columns."""
        return self.is_transposed == for_input_gradient

    @property
    def signature(self) -> tuple:
        """All properties except the values of the tensors."""
        dtypes = tuple([tensor.dtype for tensor in self.tensors])
        return (self.num_experts, dtypes, self.tensors[0].device, *self[1:])

    @property
    def is_packed(self) -> bool:
        return self.storage is not None

    @property
    def is_nested(self) -> bool:
        """Whether scales are two-level."""
        return self.is_packed and self.storage.second_level != ""

    @property
    def tile_block(self) -> tuple[int, int] | None:
        """Rows and columns that share a scale; None if blocks are not a grid that tiles can use."""
        return self.storage.tile_block(self.rows, self.columns, self.parts) if self.is_packed else None


def packed_weight(stack: Stack) -> PackedWeight:
    """Views of a stack's tensors.

    Raises:
        TypeError: the class of the stack is not supported by the kernels.
    """
    rows, columns = stack.shape[1:]
    if isinstance(stack, DenseStack):
        return PackedWeight((stack.weight,), rows, columns, stack.is_transposed, None)
    if not isinstance(stack, QuantizedStack):
        raise TypeError(f"Expected a DenseStack or QuantizedStack, found {type(stack).__name__}.")
    tensors = tuple(stack.tensors.values())
    return PackedWeight(tensors, rows, columns, stack.is_transposed, stack.storage, stack.parts, stack.storage_name)


def why_not_read(stack: Stack) -> str | None:
    """The reason why the kernels do not support the storage of a stack; None if they do."""
    if stack.storage is None:
        return None
    # torch.compile warns about traced caches
    find = why_not_read_as.__wrapped__ if torch.compiler.is_compiling() else why_not_read_as
    return find(stack.storage, *stack.shape[1:], stack.parts)


@cache
def why_not_read_as(storage: Format, rows: int, columns: int, parts: int = 1) -> str | None:
    """The reason why the kernels do not support matrices of a format; None if they do."""
    if rows * columns >= 2**31:
        return "the kernels index the weights of a matrix in 32 bits"
    if storage.kernel_codes is None:
        return f"the kernels have no decoder for {storage}"
    if storage.flat_blocksize is None and (storage.tile_block(rows, columns, parts) is None or columns % 2):
        return f"the kernels' tiles do not match the blocks of {storage}"
    return None


class Factors(NamedTuple):
    """One low-rank term: `A (E, R, in)`, `B (E, out, R)` and the scaling of their product."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float


class Gate(NamedTuple):
    """A gate that the kernels support.

    Args:
        kind: `"silu"`: silu(g) * u. `"gelu_tanh"`: gelu(g) * u by the tanh formula. `"clamped_silu"`:
            silu(min(g, limit)) * clamp(u). `"swiglu_oai"`: (clamp(u) + 1) * g' * sigmoid(alpha * g') with
            g' = min(g, limit), as in gpt-oss. clamp is to [-limit, limit].
        interleaved: gate and up columns alternate, instead of being two consecutive blocks.
        limit: limit of the clamps.
        alpha: factor in the sigmoid.
    """

    kind: str
    interleaved: bool = False
    limit: float = 0.0
    alpha: float = 0.0


def as_factors(A: torch.Tensor | None, B: torch.Tensor | None, scaling: float) -> Factors | None:
    return None if A is None else Factors(A, B, scaling)
