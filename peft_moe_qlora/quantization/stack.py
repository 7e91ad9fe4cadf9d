"""A stack: the weights of one projection of all experts, frozen, in one of several storages.

Letters: E experts, `rows` and `columns` the two last dimensions as stored. A stack is `(E, out, in)`, or
`(E, in, out)` where the class declares `is_transposed`; the codes follow the stored order either way.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import pad

from .fidelity import Fidelity
from .four_bit import FourBitFormat, NestedAbsmax, dequantize, nest, quantize, unnest

Delta = Callable[[int], torch.Tensor]
_LARGEST_CALL = 2**30


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _check_finite(matrix: torch.Tensor, expert: int) -> None:
    if not torch.isfinite(matrix).all():
        raise ValueError(f"NaNs detected in the weights of expert {expert}, or values out of range.")


class Stack(nn.Module, ABC):
    """What every storage offers.

    Args:
        shape: `(E, rows, columns)` of the 16-bit parameter it stands for.
        is_transposed: whether a matrix is stored `(in, out)`.
    """

    def __init__(self, shape: torch.Size, is_transposed: bool) -> None:
        super().__init__()
        self.shape = torch.Size(shape)
        self.is_transposed = is_transposed
        self.fidelity: Fidelity | None = None
        """Of the stored weights to the exact merged ones; None if nothing was merged into 4 bits."""
        self.merge_notes: tuple[str, ...] = ()
        """What a reader of the merge's report should know of how this stack was rounded."""

    @property
    def num_experts(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[1] if self.is_transposed else self.shape[2]

    @property
    def out_features(self) -> int:
        return self.shape[2] if self.is_transposed else self.shape[1]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored, scales included."""
        return sum(parameter.nbytes for parameter in self.parameters())

    @property
    def storage(self) -> FourBitFormat | None:
        """The 4-bit format, None where the stack is kept in floating point."""
        return None

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of the parameter it stands for."""

    @abstractmethod
    def decode_expert(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """`(rows, columns)` weights of one expert."""

    @abstractmethod
    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        """`(E, rows, columns)` weights of all experts."""

    @abstractmethod
    def set_expert(self, expert: int, matrix: torch.Tensor) -> None:
        """Stores `(rows, columns)` weights in the place of one expert.

        Raises:
            ValueError: a weight is not finite.
        """

    @abstractmethod
    def compute_dtype(self, activation_dtype: torch.dtype) -> torch.dtype:
        """The dtype in which activations meet the weights, outside autocast."""

    @abstractmethod
    def merged(self, delta: Delta) -> Stack:
        """A new stack that holds weights plus delta, in this one's storage; this one stays as it is.

        Args:
            delta: gives the `(out, in)` fp32 delta of an expert.

        Raises:
            ValueError: a merged weight is not finite.
        """

    def alias(self) -> Stack:
        """The same stack as another module: whatever becomes of the parameters of one is of both."""
        return copy.copy(self)  # the dictionary of parameters is shared

    def merged_matrices(self, delta: Delta) -> Callable[[int], torch.Tensor]:
        """For each expert its exact merged `(rows, columns)` matrix in fp32."""

        def matrix(expert: int) -> torch.Tensor:
            update = delta(expert)
            return self.decode_expert(expert, torch.float32) + (update.T if self.is_transposed else update)

        return matrix

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.storage or self.dtype}, is_transposed={self.is_transposed}"


class DenseStack(Stack):
    """A stack left in floating point.

    Args:
        weight: `(E, rows, columns)`; taken over, and copied only if it is not contiguous.
    """

    def __init__(self, weight: torch.Tensor, is_transposed: bool) -> None:
        super().__init__(weight.shape, is_transposed)
        self.weight = _frozen(weight.detach().contiguous())

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def decode_expert(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        return self.weight[expert].to(dtype)

    @torch.no_grad()
    def set_expert(self, expert: int, matrix: torch.Tensor) -> None:
        self.weight[expert] = matrix
        _check_finite(self.weight[expert], expert)

    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        return self.weight.to(dtype)

    def compute_dtype(self, activation_dtype: torch.dtype) -> torch.dtype:
        # casting the rows is cheaper than casting a whole stack; transformers does the same
        return self.weight.dtype

    def merged(self, delta: Delta) -> DenseStack:
        return self.from_matrices(self.merged_matrices(delta), self.shape, self.dtype, self.is_transposed, self.device)

    @classmethod
    def from_matrices(
        cls,
        matrices: Callable[[int], torch.Tensor],
        shape: torch.Size,
        dtype: torch.dtype,
        is_transposed: bool,
        device: torch.device,
    ) -> DenseStack:
        """Rounds each expert's `(rows, columns)` matrix once, to `dtype`.

        Raises:
            ValueError: a rounded weight is not finite.
        """
        stack = cls(torch.empty(shape, dtype=dtype, device=device), is_transposed)
        for expert in range(shape[0]):
            stack.set_expert(expert, matrices(expert))
        return stack


class QuantizedStack(Stack):
    """A stack in 4 bits: per expert the codes and scales of `bitsandbytes.functional.quantize_4bit`.

    Every expert is quantized by itself, so that no block spans two experts whatever the sizes. All tensors are frozen
    parameters with the experts in front, so that sharding by expert (FSDP2, expert parallelism) works on each alike.
    All are integers: engines of mixed precision (FSDP2, DeepSpeed) round floating parameters to 16 bits.

    Parameters:
        codes: `(E, ceil(rows * columns / 2))` uint8.
        block_absmax: `(E, num_blocks)`: int32, the bits of fp32; or uint8 with `double_quant`.
        group_absmax: `(E, ceil(num_blocks / 256))` int32, the bits of fp32; with `double_quant` only.
        offset: `(E,)` int32, the bits of fp32; with `double_quant` only.
    """

    def __init__(
        self,
        shape: torch.Size,
        dtype: torch.dtype,
        is_transposed: bool,
        storage: FourBitFormat,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(shape, is_transposed)
        self._dtype = dtype
        self._storage = storage
        numel = self.shape[1] * self.shape[2]
        num_blocks = -(-numel // storage.blocksize)

        def empty(*size: int, dtype: torch.dtype) -> nn.Parameter:
            return _frozen(torch.empty(self.num_experts, *size, dtype=dtype, device=device))

        self.codes = empty(-(-numel // 2), dtype=torch.uint8)
        if storage.double_quant:
            self.block_absmax = empty(num_blocks, dtype=torch.uint8)
            self.group_absmax = empty(-(-num_blocks // 256), dtype=torch.int32)
            self.offset = empty(dtype=torch.int32)
        else:
            self.block_absmax = empty(num_blocks, dtype=torch.int32)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def storage(self) -> FourBitFormat:
        return self._storage

    @classmethod
    def from_dense(cls, weight: torch.Tensor, is_transposed: bool, storage: FourBitFormat) -> QuantizedStack:
        """Quantizes a `(E, rows, columns)` stack on its own device, expert by expert."""
        stack = cls(weight.shape, weight.dtype, is_transposed, storage, weight.device)
        for expert in range(stack.num_experts):
            stack.set_expert(expert, weight[expert])
        return stack

    @torch.no_grad()
    def set_expert(self, expert: int, matrix: torch.Tensor) -> None:
        _check_finite(matrix, expert)
        codes, absmax = quantize(matrix.detach(), self.storage)
        self.codes[expert] = codes
        self.set_scales(expert, absmax)

    @torch.no_grad()
    def set_scales(self, expert: int, absmax: torch.Tensor) -> None:
        """Stores `(num_blocks,)` fp32 scales; with `double_quant` they are rounded to 8 bits."""
        if self.storage.double_quant:
            nested = nest(absmax)
            self.block_absmax[expert] = nested.codes
            self.group_absmax[expert] = nested.absmax.view(torch.int32)
            self.offset[expert] = nested.offset.view(torch.int32)
        else:
            self.block_absmax[expert] = absmax.view(torch.int32)

    @torch.no_grad()
    def set_codes(self, expert: int, codes: torch.Tensor) -> None:
        """Stores `(rows, columns)` uint8 codes, one to a byte."""
        flat = codes.flatten()
        pairs = pad(flat, (0, len(flat) % 2)).view(-1, 2)
        self.codes[expert] = pairs[:, 0] << 4 | pairs[:, 1]

    def scales(self, experts: slice) -> torch.Tensor:
        """`(number of experts, num_blocks)` fp32 scales."""
        if not self.storage.double_quant:
            return self.block_absmax[experts].view(torch.float32)
        group_absmax, offset = (bits[experts].view(torch.float32) for bits in (self.group_absmax, self.offset))
        return unnest(NestedAbsmax(self.block_absmax[experts], group_absmax, offset))

    @torch.no_grad()
    def decode_expert(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        return self._decode_slice(slice(expert, expert + 1), dtype)[0]

    @torch.no_grad()
    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        _, rows, columns = self.shape
        blocks_align = (rows * columns) % self.storage.blocksize == 0
        # a library call counts its values in 32 bits, and a stack may hold more
        step = max(1, _LARGEST_CALL // (rows * columns)) if blocks_align else 1
        if step >= self.num_experts:
            return self._decode_slice(slice(0, self.num_experts), dtype)
        stack = torch.empty(self.shape, dtype=dtype, device=self.device)
        for start in range(0, self.num_experts, step):
            experts = slice(start, min(start + step, self.num_experts))
            stack[experts] = self._decode_slice(experts, dtype)
        return stack

    def _decode_slice(self, experts: slice, dtype: torch.dtype) -> torch.Tensor:
        _, rows, columns = self.shape
        count = experts.stop - experts.start
        absmax = self.scales(experts).flatten()
        values = dequantize(self.codes[experts].flatten(), absmax, count * rows * columns, self.storage, dtype)
        return values.view(count, rows, columns)

    def compute_dtype(self, activation_dtype: torch.dtype) -> torch.dtype:
        return activation_dtype

    def merged(self, delta: Delta) -> QuantizedStack:
        stack = QuantizedStack(self.shape, self.dtype, self.is_transposed, self.storage, self.device)
        matrices = self.merged_matrices(delta)
        fidelity = Fidelity()
        for expert in range(self.num_experts):
            exact = matrices(expert)
            stack.set_expert(expert, exact)
            before = self.decode_expert(expert, torch.float32)
            fidelity.add(before, exact, stack.decode_expert(expert, torch.float32))
        stack.fidelity = fidelity
        return stack

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedStack:
        # `model.to(dtype)` means the weights that it stands for, whose dtype an empty one of them shows
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=self.device)).dtype

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)
