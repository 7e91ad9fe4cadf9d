"""What the kernels compute with, besides activations: weights, low-rank factors and gates."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..quantization import DenseStack, QuantizedStack, Stack


class PackedWeight(NamedTuple):
    """What a kernel reads of a stack.

    Args:
        tensors: `(codes, block_absmax)`, `(codes, block_absmax, group_absmax, offset)`, or the 16-bit weight alone.
            Kernels read scales in int32 as the fp32 numbers whose bits they are.
        rows: of one expert's matrix as stored.
        columns: of one expert's matrix as stored.
        is_transposed: stored `(in, out)`.
        quant_type: `""` where the weight is not packed.
        blocksize: 0 where the weight is not packed.
    """

    tensors: tuple[torch.Tensor, ...]
    rows: int
    columns: int
    is_transposed: bool
    quant_type: str
    blocksize: int

    @property
    def num_experts(self) -> int:
        return self.tensors[0].shape[0]

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
        """All but the numbers."""
        dtypes = tuple([tensor.dtype for tensor in self.tensors])
        return (self.num_experts, dtypes, self.tensors[0].device, *self[1:])

    @property
    def is_packed(self) -> bool:
        return self.quant_type != ""

    @property
    def is_nested(self) -> bool:
        return len(self.tensors) == 4

    @property
    def blocks_follow_rows(self) -> bool:
        """Whether each stored row is a whole number of blocks, so that tiles can find their scales."""
        return self.is_packed and self.columns % self.blocksize == 0


def packed_weight(stack: Stack) -> PackedWeight:
    """A view of a stack's tensors.

    Raises:
        TypeError: the stack is of a storage that the kernels can't read.
    """
    rows, columns = stack.shape[1:]
    if isinstance(stack, DenseStack):
        return PackedWeight((stack.weight,), rows, columns, stack.is_transposed, "", 0)
    if not isinstance(stack, QuantizedStack):
        raise TypeError(f"the kernels read DenseStack and QuantizedStack, not {type(stack).__name__}.")
    tensors = (stack.codes, stack.block_absmax)
    if stack.storage.double_quant:
        tensors += (stack.group_absmax, stack.offset)
    storage = stack.storage
    return PackedWeight(tensors, rows, columns, stack.is_transposed, storage.quant_type, storage.blocksize)


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
