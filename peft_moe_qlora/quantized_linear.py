"""A linear layer whose weight is stored in a `Format` and decoded for each product."""

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
    """Type of `QuantizedLinear.weight`: a tensor whose `data` cannot be assigned.

    PEFT's layers merge with `base_layer.weight.data += delta`, which would have no effect on the stored weight.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        raise ValueError(
            "The weight of a QuantizedLinear is decoded at each access, so values assigned to its data are lost. "
            "Merge adapters of MoeQLoraConfig, which quantizes the merged weight, or call layer.set_weight(matrix)."
        )


def _decode(
    tensors: Iterable[torch.Tensor], storage: Format, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """Decodes a matrix from the tensors of the format, in the order of the format."""
    return decode_matrix(list(tensors), storage, *shape, dtype)


def _product(
    inputs: torch.Tensor, bias: torch.Tensor | None, weight: torch.Tensor, for_input_gradient: bool
) -> torch.Tensor:
    return inputs @ weight if for_input_gradient else linear(inputs, weight, bias)


class _StoredLinear(torch.autograd.Function):
    """`nn.functional.linear` with the weight of a layer, which the backward decodes again."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, bias: torch.Tensor | None, layer: QuantizedLinear) -> torch.Tensor:
        # save the layer, not its tensors: a sharding engine may replace them before the backward
        ctx.layer = layer
        return _product(inputs, bias, layer.decode(inputs.dtype), False)

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        of_inputs, of_bias, _ = ctx.needs_input_grad
        grad_inputs = _product(grad_out, None, ctx.layer.decode(grad_out.dtype), True) if of_inputs else None
        return grad_inputs, bias_gradient(grad_out) if of_bias else None, None


# The same as custom operators: torch.compile would trace the decoding and save the weight for the backward


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
    # not saved tensors: they are frozen and shared by all steps
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
    """An `nn.Linear` with a quantized weight; its parameters are the tensors of the format, with the format's names.

    They are frozen integer tensors, as in `QuantizedStack`. A bias is an ordinary parameter. `weight` is read-only; it
    exists for models that read the dtype of a layer or compute with the weight directly.

    Args:
        in_features: columns of the weight.
        out_features: rows of the weight.
        storage: the format.
        bias: whether the layer has a bias.
        dtype: dtype of the decoded weight. Default: torch's default dtype.
        device: device of the tensors, which are not initialized.
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
        nn.Module.__init__(self)  # nn.Linear's would allocate a weight
        self.in_features = in_features
        self.out_features = out_features
        self._storage = storage
        self.storage_name = str(storage)  # torch.compile cannot format numbers into strings
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
        """Difference of the stored weight from the exact merged weight; None if nothing was merged."""

    @classmethod
    def from_linear(cls, layer: nn.Linear, storage: Format) -> QuantizedLinear:
        """Quantizes a linear layer on its device and keeps its bias.

        Raises:
            ValueError: a weight is not finite, or the format does not support the shape.
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
        """Dtype of the decoded weight."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._parameters[self._names[0]].device

    @property
    def _shape(self) -> list[int]:
        return [self.out_features, self.in_features]

    @property
    def weight(self) -> torch.Tensor:
        """Decoded weight, `(out, in)` in `dtype`; read-only."""
        weight = self.decode(self.dtype)
        # torch.compile does not support the subclass
        return weight if torch.compiler.is_compiling() else weight.as_subclass(DecodedWeight)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The stored tensors by the format's names."""
        return {name: self._parameters[name] for name in self._names}

    @property
    def stored_matrix(self) -> StoredMatrix:
        """The stored tensors with shape and format."""
        return StoredMatrix(tuple(self.tensors.values()), *self._shape, self.storage, self.storage_name)

    @torch.no_grad()
    def set_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copies tensors into the stored ones.

        Args:
            tensors: all tensors, with the format's names, shapes and dtypes.

        Raises:
            ValueError: names, shapes or dtypes do not match, or the layer is on the meta device.
        """
        if self.device.type == "meta":
            raise ValueError(
                "A QuantizedLinear on the meta device cannot store tensors. Call to_empty(device=...) first."
            )
        expected = self.storage.tensors(*self._shape)
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        if found != {name: (spec.shape, spec.dtype) for name, spec in expected.items()}:
            raise ValueError(
                f"Expected tensors { {name: tuple(spec) for name, spec in expected.items()} } for {self.out_features} "
                f"x {self.in_features} weights in {self.storage}, found {found}."
            )
        for name, tensor in tensors.items():
            self._parameters[name].copy_(tensor)

    @torch.no_grad()
    def set_weight(self, matrix: torch.Tensor) -> None:
        """Quantizes and stores a `(out, in)` weight.

        Raises:
            ValueError: a weight is not finite, or the shape does not match.
        """
        if list(matrix.shape) != self._shape:
            raise ValueError(f"Expected a weight of shape {tuple(self._shape)}, found {tuple(matrix.shape)}.")
        _check_finite(matrix)
        self.set_tensors(self.storage.quantize(matrix.detach().contiguous()))

    @torch.no_grad()
    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        """Decodes the `(out, in)` weight."""
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
        """Returns a frozen `nn.Linear` with the decoded weight; this layer is not changed.

        Args:
            dtype: dtype of weight and bias. Default: `self.dtype`.
        """
        return self._dense(self.decode(dtype or self.dtype))

    @torch.no_grad()
    def merged_dense(self, delta: torch.Tensor, dtype: torch.dtype) -> nn.Linear:
        """Returns a frozen `nn.Linear` with weight plus delta, added in fp32 and rounded once to `dtype`.

        Raises:
            ValueError: a rounded weight is not finite.
        """
        weight = (self.decode(torch.float32) + delta).to(dtype)
        _check_finite(weight)
        return self._dense(weight)

    @torch.no_grad()
    def merged(self, delta: torch.Tensor) -> QuantizedLinear:
        """Returns a new layer with weight plus delta in the same format, rounded to the nearest value of each block.

        Args:
            delta: `(out, in)`; if all zero, the tensors are copied.

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
        # `model.to(dtype)` changes the dtype of the decoded weight; apply `fn` to an empty tensor to get it
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
        raise ValueError("NaNs or infinite values detected in the weights of a linear layer.")
