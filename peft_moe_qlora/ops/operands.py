"""What the kernels compute with, besides activations: weights, low-rank factors and gates."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from ..quantization import DenseStack, Format, QuantizedStack, Stack, parse_format


class PackedWeight(NamedTuple):
    """What a kernel reads of a stack.

    Args:
        tensors: those of the format in its order, or the 16-bit weight alone.
        rows: of one expert's matrix as stored.
        columns: of one expert's matrix as stored.
        is_transposed: stored `(in, out)`.
        storage: the format; None where the weight is not packed.
        parts: matrices stacked along the rows that make up one.
        storage_name: name of the format, precomputed since torch.compile can't format numbers into strings.
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
        """`(rows, columns)` weights of one expert, by plain torch."""
        if self.storage is None:
            return self.tensors[0][expert].to(dtype)
        names = self.storage.tensors(self.rows, self.columns, self.parts)
        tensors = {name: tensor[expert : expert + 1] for name, tensor in zip(names, self.tensors)}
        return self.storage.dequantize(tensors, self.rows, self.columns, dtype, self.parts)[0]

    @property
    def flat_shape(self) -> list[int]:
        """The numbers among the fields, for an operator of torch; see `from_flat`."""
        return [self.rows, self.columns, int(self.is_transposed), self.parts]

    @classmethod
    def from_flat(cls, tensors: list[torch.Tensor], flat_shape: list[int], storage_name: str) -> PackedWeight:
        """From the arguments of an operator of torch."""
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
        """Whether a product runs along the stored columns: with the transposes `(in, out)`, or for gradients."""
        return self.is_transposed == for_input_gradient

    @property
    def signature(self) -> tuple:
        """Everything but the values of the tensors."""
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
        """Rows and columns that share a scale, where tiles can find their scales by them."""
        return self.storage.tile_block(self.rows, self.columns, self.parts) if self.is_packed else None


def packed_weight(stack: Stack) -> PackedWeight:
    """A view of a stack's tensors.

    Raises:
        TypeError: the stack is of a storage that the kernels can't read.
    """
    rows, columns = stack.shape[1:]
    if isinstance(stack, DenseStack):
        return PackedWeight((stack.weight,), rows, columns, stack.is_transposed, None)
    if not isinstance(stack, QuantizedStack):
        raise TypeError(f"the kernels read DenseStack and QuantizedStack, not {type(stack).__name__}.")
    tensors = tuple(stack.tensors.values())
    return PackedWeight(tensors, rows, columns, stack.is_transposed, stack.storage, stack.parts, stack.storage_name)


def why_not_read(stack: Stack) -> str | None:
    """Why the kernels can't read a stack; None if they can."""
    if stack.storage is None:
        return None
    # torch.compile warns of caches that it sees
    find = why_not_read_as.__wrapped__ if torch.compiler.is_compiling() else why_not_read_as
    return find(stack.storage, *stack.shape[1:], stack.parts)


@cache
def why_not_read_as(storage: Format, rows: int, columns: int, parts: int = 1) -> str | None:
    """The same for matrices of a format."""
    if rows * columns >= 2**31:
        return "the kernels count the weights of a matrix in 32 bits"
    if storage.kernel_codes is None:
        return f"the kernels have no decoder for {storage}"
    if storage.flat_blocksize is None and (storage.tile_block(rows, columns, parts) is None or columns % 2):
        return f"the kernels' tiles don't fit the blocks of {storage}"
    return None


class Factors(NamedTuple):
    """One low-rank term: `A (E, R, in)`, `B (E, out, R)` and what their product is scaled by."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float


class Gate(NamedTuple):
    """A gate that the kernels know.

    Args:
        kind: `"silu"`: silu(g) * u. `"gelu_tanh"`: gelu(g) * u by the tanh formula. `"clamped_silu"`:
            silu(min(g, limit)) * clamp(u). `"swiglu_oai"`: (clamp(u) + 1) * g' * sigmoid(alpha * g') with
            g' = min(g, limit), as in gpt-oss. clamp is to [-limit, limit].
        interleaved: gate and up columns alternate, instead of standing one block after the other.
        limit: of the clamps.
        alpha: of the sigmoid.
    """

    kind: str
    interleaved: bool = False
    limit: float = 0.0
    alpha: float = 0.0


def as_factors(A: torch.Tensor | None, B: torch.Tensor | None, scaling: float) -> Factors | None:
    return None if A is None else Factors(A, B, scaling)
