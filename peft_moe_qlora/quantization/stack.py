"""Stacks: the frozen weights of one projection of all experts, in floating point or in a storage format.

Letters: E experts, `rows` and `columns` the two last dimensions as stored. A stack is `(E, out, in)`, or
`(E, in, out)` if the class declares `is_transposed`; codes are in the stored order in both cases.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from ..sharded import whole_shape
from .decode_op import dequantize
from .fidelity import Fidelity
from .format import Format, Tensors

Delta = Callable[[int], torch.Tensor]


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _check_finite(matrix: torch.Tensor, expert: int) -> None:
    if not torch.isfinite(matrix).all():
        raise ValueError(f"NaNs or infinite values detected in the weights of expert {expert}.")


def check_names(names: Iterable[str], module: nn.Module, storage: Format) -> None:
    """Rejects a format whose tensor names are already attributes of a module.

    Raises:
        ValueError: a name is taken; the error names the first.
    """
    taken = [name for name in names if hasattr(type(module), name) or name in (*vars(module), "bias")]
    if taken:
        raise ValueError(
            f"{storage} has a tensor named {taken[0]!r}, which is already an attribute of {type(module).__name__}. "
            f"Choose another name in the format, such as block_{taken[0]}."
        )


class Stack(nn.Module, ABC):
    """Interface of stacks.

    Args:
        shape: `(E, rows, columns)` of the 16-bit parameter that the stack replaces.
        is_transposed: whether a matrix is stored `(in, out)`.
    """

    def __init__(self, shape: torch.Size, is_transposed: bool) -> None:
        super().__init__()
        self.shape = torch.Size(shape)
        self.is_transposed = is_transposed
        self.fidelity: Fidelity | None = None
        """Error of the stored weights relative to the exact merged ones; None if no merge has requantized them."""
        self.merge_notes: tuple[str, ...] = ()
        """Notes on the rounding of this stack, for the merge report."""
        self.experts_read: range | None = None
        """Experts that this process has read, if others have read the rest; None for all."""

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
        """Size of all stored tensors, scales included, over all processes."""
        return sum(whole_shape(one).numel() * one.itemsize for one in self.parameters())

    @property
    def storage(self) -> Format | None:
        """The storage format, None for a stack in floating point."""
        return None

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of the parameter that the stack replaces."""

    @abstractmethod
    def decode_expert(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """`(rows, columns)` weights of one expert."""

    @abstractmethod
    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        """`(E, rows, columns)` weights of all experts."""

    @abstractmethod
    def set_expert(self, expert: int, matrix: torch.Tensor) -> None:
        """Stores the `(rows, columns)` weights of one expert.

        Raises:
            ValueError: a weight is not finite.
        """

    @abstractmethod
    def compute_dtype(self, activation_dtype: torch.dtype) -> torch.dtype:
        """The dtype of products of activations and weights, outside autocast."""

    @abstractmethod
    def merged(self, delta: Delta) -> Stack:
        """A new stack of weights plus delta, in the same storage; this stack does not change.

        The stored tensors of an expert without a delta are copied.

        Args:
            delta: returns the `(out, in)` fp32 delta of an expert.

        Raises:
            ValueError: a merged weight is not finite.
        """

    def alias(self) -> Stack:
        """Another module that shares the parameters of this stack; a change of one changes both."""
        return copy.copy(self)  # shares the dictionary of parameters

    def merged_matrices(self, delta: Delta) -> Callable[[int], torch.Tensor]:
        """A function that returns the exact merged `(rows, columns)` matrix of an expert, in fp32."""

        def matrix(expert: int) -> torch.Tensor:
            update = delta(expert)
            return self.decode_expert(expert, torch.float32) + (update.T if self.is_transposed else update)

        return matrix

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.storage or self.dtype}, is_transposed={self.is_transposed}"


class DenseStack(Stack):
    """A stack in floating point.

    Args:
        weight: `(E, rows, columns)`; copied only if it is not contiguous.
        is_transposed: whether a matrix is stored `(in, out)`.
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
        # casting the activations is cheaper than casting the stack; transformers does the same
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
    """A stack in a `Format`. The tensors of the format are its parameters, under the format's names.

    Every expert is quantized separately, so no block spans two experts. All tensors are frozen parameters whose first
    dimension is the expert, so all can be sharded by expert (FSDP2, expert parallelism). All have integer dtypes, and
    scales are stored as bits, because mixed precision (FSDP2, DeepSpeed) would cast floating-point parameters to
    16 bits.

    Args:
        shape: `(E, rows, columns)` as stored.
        dtype: dtype of the parameter that the stack replaces.
        is_transposed: whether a matrix is stored `(in, out)`.
        storage: storage format.
        device: device of the tensors, which are not initialized.
        parts: number of matrices of equal size, stacked along the rows, that make up one; no block spans two.

    Raises:
        ValueError: the format stores only `(out, in)` matrices, does not support the shape, or has a tensor whose name
            is an attribute of the module.
    """

    def __init__(
        self,
        shape: torch.Size,
        dtype: torch.dtype,
        is_transposed: bool,
        storage: Format,
        device: torch.device | str | None = None,
        parts: int = 1,
    ) -> None:
        super().__init__(shape, is_transposed)
        # parts are along the output features; formats that store (in, out) have no blocks of several rows
        parts = 1 if is_transposed else parts
        storage.check_shape(*self.shape[1:], parts)
        if is_transposed and storage.is_out_in:
            raise ValueError(
                f"{storage} stores matrices as (out, in), but the stack of shape {tuple(shape)} is (in, out). "
                "Transpose the stack, or use a 4-bit format such as nf4/64."
            )
        self._dtype = dtype
        self._storage = storage
        self.storage_name = str(storage)
        self.parts = parts
        specs = storage.tensors(*self.shape[1:], parts)
        check_names(specs, self, storage)
        self._names = tuple(specs)
        for name, spec in specs.items():
            tensor = torch.empty(self.num_experts, *spec.shape, dtype=spec.dtype, device=device)
            self.register_parameter(name, _frozen(tensor))

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def storage(self) -> Format:
        return self._storage

    @classmethod
    def from_dense(cls, weight: torch.Tensor, is_transposed: bool, storage: Format, parts: int = 1) -> QuantizedStack:
        """Quantizes a `(E, rows, columns)` stack on its device, expert by expert.

        Args:
            weight: the weights.
            is_transposed: whether they are `(E, in, out)`. If the format stores only `(out, in)`, they are transposed.
            storage: storage format.
            parts: see the class.
        """
        if is_transposed and storage.is_out_in:
            weight, is_transposed = weight.transpose(1, 2), False
        stack = cls(weight.shape, weight.dtype, is_transposed, storage, weight.device, parts)
        for expert in range(stack.num_experts):
            stack.set_expert(expert, weight[expert])
        return stack

    def like_this(self) -> QuantizedStack:
        """An empty stack with the same shape and storage."""
        return QuantizedStack(self.shape, self.dtype, self.is_transposed, self.storage, self.device, self.parts)

    @property
    def tensors(self) -> dict[str, nn.Parameter]:
        """Name -> stored tensor, with the names and in the order of the format."""
        return {name: self._parameters[name] for name in self._names}

    def tensors_of(self, experts: slice) -> dict[str, torch.Tensor]:
        """Name -> stored tensor of some experts, `(number of experts, ...)`."""
        return {name: tensor[experts] for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def set_tensors(self, expert: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Stores the tensors of one expert, with the names, shapes and dtypes of the format."""
        for name, tensor in tensors.items():
            self._parameters[name][expert] = tensor

    @torch.no_grad()
    def set_expert(self, expert: int, matrix: torch.Tensor) -> None:
        _check_finite(matrix, expert)
        self.set_tensors(expert, self.storage.quantize(matrix.detach().contiguous(), self.parts))

    def set_scales(self, expert: int, scales: torch.Tensor, before: Tensors | None = None) -> None:
        """Stores `(num_blocks,)` fp32 scales, which the format may round.

        Args:
            expert: index of the expert.
            scales: scales in the order of the format's blocks.
            before: name -> stored tensors of the matrix before, if it is requantized.
        """
        if before is None:
            self.set_tensors(expert, self.storage.store_scales(scales, *self.shape[1:], self.parts))
        else:
            self.set_tensors(expert, self.storage.store_scales_anew(scales, before, *self.shape[1:], self.parts))

    def set_codes(self, expert: int, codes: torch.Tensor) -> None:
        """Stores `(rows, columns)` uint8 codes, one per byte."""
        self.set_tensors(expert, self.storage.store_codes(codes))

    def scales(self, experts: slice) -> torch.Tensor:
        """`(number of experts, num_blocks)` fp32 scales."""
        return self.storage.scales(self.tensors_of(experts))

    def scale_of_weights(self, expert: int) -> torch.Tensor:
        """`(rows, columns)` fp32: the scale of each weight of one expert."""
        scales = self.scales(slice(expert, expert + 1))[0]
        return self.storage.scale_of_weights(scales, *self.shape[1:], self.parts)

    @torch.no_grad()
    def decode_expert(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        return self._decode_slice(slice(expert, expert + 1), dtype)[0]

    @torch.no_grad()
    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        step = self.storage.matrices_at_a_time(*self.shape[1:])
        if step >= self.num_experts:
            return self._decode_slice(slice(0, self.num_experts), dtype)
        stack = torch.empty(self.shape, dtype=dtype, device=self.device)
        for start in range(0, self.num_experts, step):
            experts = slice(start, min(start + step, self.num_experts))
            stack[experts] = self._decode_slice(experts, dtype)
        return stack

    def _decode_slice(self, experts: slice, dtype: torch.dtype) -> torch.Tensor:
        return dequantize(
            self.storage, self.storage_name, self.tensors_of(experts), *self.shape[1:], dtype, self.parts
        )

    def compute_dtype(self, activation_dtype: torch.dtype) -> torch.dtype:
        return activation_dtype

    def merged(self, delta: Delta) -> QuantizedStack:
        stack = self.like_this()
        matrices = self.merged_matrices(delta)
        fidelity = Fidelity()
        for expert in range(self.num_experts):
            exact = matrices(expert)
            before = self.decode_expert(expert, torch.float32)
            _check_finite(exact, expert)
            stored = {name: tensor[0] for name, tensor in self.tensors_of(slice(expert, expert + 1)).items()}
            if not torch.equal(exact, before):
                stored = self.storage.requantize(exact, stored, self.parts)
            stack.set_tensors(expert, stored)
            fidelity.add(before, exact, stack.decode_expert(expert, torch.float32))
        stack.fidelity = fidelity
        return stack

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedStack:
        # `model.to(dtype)` changes the dtype of the weights that the stack replaces; an empty tensor shows the result
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=self.device)).dtype

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)
