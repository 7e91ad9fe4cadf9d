"""A linear layer whose weight is kept in a `Format`, and decoded for each product."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from .ops import StoredMatrix, bias_gradient, decode_matrix, linear_dtype
from .quantization import Fidelity, Format, parse_format
from .quantization.stack import check_names


class DecodedWeight(torch.Tensor):
    """What `QuantizedLinear.weight` gives: a tensor like any other, but that setting its `data` is refused.

    PEFT's own layers merge by `base_layer.weight.data += delta`, which would be lost with the decoded weight.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        raise ValueError(
            "The weight of a QuantizedLinear is decoded anew each time it is asked for, so that what is written to it "
            "is lost. Merge adapters of MoeQLoraConfig, which are stored anew, or call layer.set_weight(matrix)."
        )


def _decode(
    tensors: Iterable[torch.Tensor], storage: Format, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """The matrix of a shape, of the format's tensors in its order."""
    return decode_matrix(list(tensors), storage, *shape, dtype)


def _product(
    inputs: torch.Tensor, bias: torch.Tensor | None, weight: torch.Tensor, for_input_gradient: bool
) -> torch.Tensor:
    return inputs @ weight if for_input_gradient else linear(inputs, weight, bias)


class _StoredLinear(torch.autograd.Function):
    """`nn.functional.linear` with the weight of a layer, which is decoded again for the gradient."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, bias: torch.Tensor | None, layer: QuantizedLinear) -> torch.Tensor:
        # the layer, not its tensors: whoever shards them has others there in the backward
        ctx.layer = layer
        return _product(inputs, bias, layer.decode(inputs.dtype), False)

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        of_inputs, of_bias, _ = ctx.needs_input_grad
        grad_inputs = _product(grad_out, None, ctx.layer.decode(grad_out.dtype), True) if of_inputs else None
        return grad_inputs, bias_gradient(grad_out) if of_bias else None, None


# The same for torch.compile, as operators: it would trace the decoding, and save the weight for the backward


@torch.library.custom_op("peft_moe_qlora::decode_matrix", mutates_args=())
def _decode_op(tensors: list[torch.Tensor], storage: str, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    return _decode(tensors, parse_format(storage), shape, dtype)


@_decode_op.register_fake
def _(tensors, storage, shape, dtype):
    return tensors[0].new_empty(shape, dtype=dtype)


@torch.library.custom_op("peft_moe_qlora::stored_linear", mutates_args=())
def _linear_op(
    inputs: torch.Tensor,
    bias: torch.Tensor | None,
    tensors: list[torch.Tensor],
    storage: str,
    shape: list[int],
    for_input_gradient: bool,
) -> torch.Tensor:
    weight = _decode(tensors, parse_format(storage), shape, inputs.dtype)
    return _product(inputs, bias, weight, for_input_gradient).contiguous()


@_linear_op.register_fake
def _(inputs, bias, tensors, storage, shape, for_input_gradient):
    return inputs.new_empty((*inputs.shape[:-1], shape[1] if for_input_gradient else shape[0]))


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    # frozen, and shared by every step: not activations
    ctx.tensors, ctx.storage, ctx.shape, ctx.for_input_gradient = inputs[2:]


def _backward(ctx: Any, grad_out: torch.Tensor) -> tuple:
    of_inputs, of_bias, *_ = ctx.needs_input_grad
    grad_inputs = None
    if of_inputs:
        back = not ctx.for_input_gradient
        grad_inputs = _linear_op(grad_out, None, ctx.tensors, ctx.storage, ctx.shape, back)
    return grad_inputs, bias_gradient(grad_out) if of_bias else None, [None] * len(ctx.tensors), None, None, None


_linear_op.register_autograd(_backward, setup_context=_setup_context)


class QuantizedLinear(nn.Linear):
    """An `nn.Linear` without a 16-bit weight; the format's tensors are its parameters, by the format's names.

    They are frozen and all integers, as those of `QuantizedStack`. A bias is an ordinary parameter. `weight` is there
    to be read, for models that ask a layer for its dtype or compute with the weight themselves.

    Args:
        in_features: columns of the weight.
        out_features: its rows.
        storage: the format.
        bias: whether there is one.
        dtype: of the weight that it stands for. Default: torch's.
        device: of the tensors, which are left as they are allocated.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        storage: Format,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # that of nn.Linear would allocate a weight
        self.in_features = in_features
        self.out_features = out_features
        self._storage = storage
        self.storage_name = str(storage)  # torch.compile can't put numbers into text
        self._dtype = dtype or torch.get_default_dtype()
        specs = storage.tensors(out_features, in_features)
        check_names(specs, self, storage)
        storage.check_shape(out_features, in_features)
        self._names = tuple(specs)
        for name, spec in specs.items():
            tensor = torch.empty(spec.shape, dtype=spec.dtype, device=device)
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        values = torch.empty(out_features, dtype=self._dtype, device=device) if bias else None
        self.register_parameter("bias", None if values is None else nn.Parameter(values))
        self.fidelity: Fidelity | None = None
        """Of the stored weight to the exact merged one; None if nothing was merged."""

    @classmethod
    def from_linear(cls, layer: nn.Linear, storage: Format) -> QuantizedLinear:
        """Quantizes a linear layer on its own device; its bias is taken over.

        Raises:
            ValueError: a weight is not finite, or the format can't store a matrix of this shape.
        """
        weight = layer.weight
        stored = cls(layer.in_features, layer.out_features, storage, False, weight.dtype, weight.device)
        stored.set_weight(weight)
        stored.bias = layer.bias
        return stored.train(layer.training)

    @property
    def storage(self) -> Format:
        return self._storage

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight that it stands for."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._parameters[self._names[0]].device

    @property
    def _shape(self) -> list[int]:
        return [self.out_features, self.in_features]

    @property
    def weight(self) -> torch.Tensor:
        """`(out, in)` in `dtype`, decoded anew each time; to be read only."""
        weight = self.decode(self.dtype)
        # a compiler knows no class of tensor but its own, and writes to no attribute of it
        return weight if torch.compiler.is_compiling() else weight.as_subclass(DecodedWeight)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What is stored of the weight, by the format's names."""
        return {name: self._parameters[name] for name in self._names}

    @property
    def stored_matrix(self) -> StoredMatrix:
        """The same with all that is needed to decode it."""
        return StoredMatrix(tuple(self.tensors.values()), *self._shape, self.storage, self.storage_name)

    @torch.no_grad()
    def set_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copies tensors into those of the weight.

        Args:
            tensors: all of them, of the format's names, shapes and dtypes.

        Raises:
            ValueError: they are others, or the layer is on the meta device.
        """
        if self.device.type == "meta":
            raise ValueError(
                "A QuantizedLinear on the meta device can hold no tensors; call to_empty(device=...) first."
            )
        expected = self.storage.tensors(*self._shape)
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        if found != {name: (spec.shape, spec.dtype) for name, spec in expected.items()}:
            raise ValueError(
                f"{self.out_features} x {self.in_features} weights in {self.storage} are "
                f"{ {name: tuple(spec) for name, spec in expected.items()} }, but {found} were given."
            )
        for name, tensor in tensors.items():
            self._parameters[name].copy_(tensor)

    @torch.no_grad()
    def set_weight(self, matrix: torch.Tensor) -> None:
        """Quantizes a `(out, in)` weight.

        Raises:
            ValueError: it is not finite, of another shape, or of one that the format can't store.
        """
        if list(matrix.shape) != self._shape:
            raise ValueError(
                f"A weight of {self.out_features} x {self.in_features} was expected, not {tuple(matrix.shape)}."
            )
        _check_finite(matrix)
        self.set_tensors(self.storage.quantize(matrix.detach().contiguous()))

    @torch.no_grad()
    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        """The `(out, in)` weight."""
        if self.device.type == "meta":
            return torch.empty(self._shape, dtype=dtype, device="meta")
        if torch.compiler.is_compiling():
            return _decode_op(list(self.tensors.values()), self.storage_name, self._shape, dtype)
        return _decode(self.tensors.values(), self.storage, self._shape, dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        inputs = input.to(linear_dtype(input))
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        if torch.compiler.is_compiling():
            return _linear_op(inputs, bias, list(self.tensors.values()), self.storage_name, self._shape, False)
        return _StoredLinear.apply(inputs, bias, self)

    def restore(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An ordinary frozen layer of the decoded weight; this one stays as it is.

        Args:
            dtype: of the layer, the bias included. Default: the dtype that this one stands for.
        """
        return self._dense(self.decode(dtype or self.dtype))

    @torch.no_grad()
    def merged_dense(self, delta: torch.Tensor, dtype: torch.dtype) -> nn.Linear:
        """An ordinary frozen layer of weight plus delta, added in fp32 and rounded once to `dtype`.

        Raises:
            ValueError: a rounded weight is not finite.
        """
        weight = (self.decode(torch.float32) + delta).to(dtype)
        _check_finite(weight)
        return self._dense(weight)

    @torch.no_grad()
    def merged(self, delta: torch.Tensor) -> QuantizedLinear:
        """A new layer of weight plus delta in the same format, each weight as the nearest value that its block has.

        Args:
            delta: `(out, in)`; where it is all zero, the tensors are copied.

        Raises:
            ValueError: a merged weight is not finite.
        """
        layer = QuantizedLinear(self.in_features, self.out_features, self.storage, False, self.dtype, self.device)
        layer.bias = self.bias
        before = self.decode(torch.float32)
        exact = before + delta
        _check_finite(exact)
        layer.set_tensors(self.storage.requantize(exact, self.tensors) if delta.any() else self.tensors)
        layer.fidelity = Fidelity()
        layer.fidelity.add(before, exact, layer.decode(torch.float32))
        return layer.train(self.training)

    def _dense(self, weight: torch.Tensor) -> nn.Linear:
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        bias = self.bias
        if bias is not None and bias.dtype != weight.dtype:
            bias = nn.Parameter(bias.detach().to(weight.dtype), bias.requires_grad)
        layer.bias = bias
        return layer.train(self.training)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedLinear:
        # `model.to(dtype)` means the weight that it stands for, whose dtype an empty one of it shows
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=self.device)).dtype

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            is_cast = moved.dtype != tensor.dtype and not tensor.is_floating_point()
            return tensor.to(moved.device) if is_cast else moved

        return super()._apply(move, recurse)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.storage}, {self.dtype}"


def _check_finite(weight: torch.Tensor) -> None:
    if not torch.isfinite(weight).all():
        raise ValueError("NaNs detected in the weights of a linear layer, or values out of range.")
