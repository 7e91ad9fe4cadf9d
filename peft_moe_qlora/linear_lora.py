"""PEFT's LoRA on frozen linear layers, with a forward that costs what its products cost.

PEFT's own casts activations to the dtype of the factors, multiplies in it, and adds copies of the output. Factors,
their keys, merging and all that is not the plain sum of a layer and its adapters stay PEFT's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from bitsandbytes.nn import Linear4bit as StoredLinear4bit
from bitsandbytes.nn import LinearFP4, LinearNF4
from peft.tuners import lora
from torch import nn

from .ops import StoredMatrix, linear_dtype, linear_lora, low_rank_term, without_autocast
from .quantization import BLOCKSIZES, QUANT_TYPES, FourBitFormat, dynamic_map
from .quantization.formats.four_bit import NESTED_BLOCKSIZE


class Base(NamedTuple):
    """How a layer without adapters computes.

    Args:
        matrix: its weight.
        matrix_of: gives it again, for the backward.
        dtype: of the product.
        out_dtype: of what the layer gives.
    """

    matrix: StoredMatrix
    matrix_of: Callable[[], StoredMatrix]
    dtype: torch.dtype
    out_dtype: torch.dtype


class Term(NamedTuple):
    """What an adapter adds: `scaling * (dropout(x) A^T) B^T`; dropout is None where it does nothing."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    dropout: nn.Dropout | None


class FastForward:
    """Goes before a class of PEFT's, whose forward it replaces where `base` and every active adapter are plain."""

    def base(self, x: torch.Tensor) -> Base | None:
        """How the base layer computes; None where PEFT's forward has to call it."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # adapter names of a mixed batch, offsets of activated LoRA
        terms = None if args or kwargs else self._terms()
        base = self.base(x) if terms else None
        if base is None:
            return super().forward(x, *args, **kwargs)
        first, *others = terms
        rest = (*base[:3], _dropped(x, first, base.dtype))
        out = linear_lora(x, self.base_layer.bias, first.A, first.B, first.scaling, *rest)
        if others:
            with without_autocast(x.device):
                inputs = x.to(base.dtype)
                for term in others:
                    dropped = _dropped(inputs, term, base.dtype)
                    out = out + low_rank_term(inputs if dropped is None else dropped, term.A, term.B, term.scaling)
        return out.to(base.out_dtype)

    def _terms(self) -> list[Term] | None:
        """Those of active adapters; None where there are none, or one of them is more than that."""
        if self.disable_adapters or self.merged_adapters:
            return None
        terms, adapters = [], self.lora_A
        for name in self.active_adapters:
            if name not in adapters:
                continue
            A, B, dropout = adapters[name], self.lora_B[name], self.lora_dropout[name]
            if not (is_plain(A, _LINEAR) and is_plain(B, _LINEAR)) or B.bias is not None or name in self.lora_variant:
                return None
            drops = type(dropout) is nn.Dropout and dropout.training and dropout.p > 0
            if not drops and type(dropout) not in (nn.Dropout, nn.Identity):
                return None
            B, scaling = B.weight, self.scaling[name]
            if isinstance(scaling, torch.Tensor):  # where adapters are swapped in compiled models
                B, scaling = B * scaling, 1.0
            terms.append(Term(A.weight, B, float(scaling), dropout if drops else None))
        return terms

    def __repr__(self) -> str:
        return "moe_qlora." + nn.Module.__repr__(self)


def _dropped(x: torch.Tensor, term: Term, dtype: torch.dtype) -> torch.Tensor | None:
    return None if term.dropout is None else term.dropout(x.to(dtype))


_LINEAR = (nn.Linear,)


def is_plain(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether calling it does what its class does: hooks shard, offload and watch layers."""
    return (
        type(module) in kinds
        and not module._forward_pre_hooks
        and not module._forward_hooks
        and not module._backward_pre_hooks
        and not module._backward_hooks
        and "forward" not in module.__dict__  # where accelerate hooks in
    )


class LoraLinear(FastForward, lora.Linear):
    """PEFT's `lora.Linear` on a frozen `nn.Linear`."""

    def base(self, x: torch.Tensor) -> Base | None:
        layer = self.base_layer
        if not is_plain(layer, _LINEAR):
            return None
        weight, dtype = layer.weight, linear_dtype(x)
        # a weight of another dtype is an error outside autocast, and for fp64 in it
        has_dtype = weight.dtype == dtype or (dtype != torch.float64 and torch.is_autocast_enabled(x.device.type))
        if weight.requires_grad or not has_dtype or type(weight) not in (nn.Parameter, torch.Tensor):
            return None
        return Base(_dense_matrix(layer), partial(_dense_matrix, layer), dtype, dtype)


def _dense_matrix(layer: nn.Linear) -> StoredMatrix:
    return StoredMatrix((layer.weight,), *layer.weight.shape)


_LINEAR_4BIT = (StoredLinear4bit, LinearNF4, LinearFP4)
_FORMATS = {
    (quant_type, blocksize, double_quant): FourBitFormat(quant_type, blocksize, double_quant)
    for quant_type in QUANT_TYPES
    for blocksize in BLOCKSIZES
    for double_quant in (False, True)
}
_NAMES = {key: str(storage) for key, storage in _FORMATS.items()}


class LoraLinear4bit(FastForward, lora.Linear4bit):
    """PEFT's `lora.Linear4bit` on a `Linear4bit` of bitsandbytes."""

    def base(self, x: torch.Tensor) -> Base | None:
        layer = self.base_layer
        matrix = None if x.is_meta or not is_plain(layer, _LINEAR_4BIT) else four_bit_matrix(layer)
        if matrix is None:
            return None
        if not layer.compute_type_is_set:  # as the layer's own forward settles it
            layer.set_compute_type(x)
            layer.compute_type_is_set = True
        dtype = layer.compute_dtype or x.dtype
        # wider activations: PEFT multiplies them with factors as they are, but under autocast
        is_narrower = dtype.itemsize < x.dtype.itemsize and not torch.is_autocast_enabled(x.device.type)
        if is_narrower or torch.float64 in (dtype, x.dtype):
            return None
        return Base(matrix, partial(four_bit_matrix, layer), dtype, x.dtype)


def four_bit_matrix(layer: StoredLinear4bit) -> StoredMatrix | None:
    """The weight of a layer as a `FourBitFormat` has it, without a copy; None where the format can't say it."""
    weight, shape = layer.weight, (layer.out_features, layer.in_features)
    state = getattr(weight, "quant_state", None)
    if state is None:
        state = layer.quant_state  # sharding makes other parameters, without it
    if state is None or getattr(state, "packing_format_for_cpu", False) or tuple(state.shape) != shape:
        return None
    key = (state.quant_type, state.blocksize, state.nested)
    if key not in _FORMATS:
        return None
    codes, tensors = weight.detach(), (state.absmax,)
    if state.nested:
        tensors = (state.absmax, state.state2.absmax, state.offset)
        if state.state2.blocksize != NESTED_BLOCKSIZE:
            return None
    if not codes.is_contiguous() or any(tensor.dtype != torch.float32 for tensor in tensors[state.nested :]):
        return None
    if codes.dtype != torch.uint8:
        codes = codes.view(torch.uint8)
    return StoredMatrix((codes, *tensors), *shape, _FORMATS[key], _NAMES[key])


def with_fast_forward(layer: nn.Module) -> nn.Module:
    """The same layer, of a class of this module where PEFT has made it of one that is known here."""
    if type(layer) is lora.Linear and type(layer.base_layer) is nn.Linear:
        layer.__class__ = LoraLinear
    elif type(layer) is lora.Linear4bit and _has_known_scales(layer.base_layer):
        layer.__class__ = LoraLinear4bit
    return layer


def _has_known_scales(layer: nn.Module) -> bool:
    """Whether nested scales, if any, have the map of bitsandbytes; files can hold another."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None or not state.nested:  # or quantized by bitsandbytes when it is moved to a GPU
        return True
    code = state.state2.code
    return not code.is_meta and torch.equal(code, dynamic_map(code.device))
