"""PEFT's LoRA on frozen linear layers, with a faster forward.

PEFT's forward casts activations to the dtype of the factors, multiplies in that dtype, and copies the output several
times. Factors, their keys, merging and all variants other than plain LoRA are PEFT's.
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
    """Computation of a layer without adapters.

    Args:
        matrix: the weight.
        matrix_of: function that returns the weight again, for the backward.
        dtype: dtype of the product.
        out_dtype: dtype of the output.
    """

    matrix: StoredMatrix
    matrix_of: Callable[[], StoredMatrix]
    dtype: torch.dtype
    out_dtype: torch.dtype


class Term(NamedTuple):
    """Low-rank term of an adapter: `scaling * (dropout(x) A^T) B^T`; dropout is None if inactive."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    dropout: nn.Dropout | None


class FastForward:
    """Mixin before a LoRA layer of PEFT; replaces its forward if the base layer and all active adapters are plain."""

    def base(self, x: torch.Tensor) -> Base | None:
        """Computation of the base layer; None if PEFT's forward must call it."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # arguments are adapter names of a mixed batch or offsets of activated LoRA
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
        """Terms of the active adapters; None if there are none or one of them is not plain LoRA."""
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
            if isinstance(scaling, torch.Tensor):  # prepared for hotswapping in compiled models
                B, scaling = B * scaling, 1.0
            terms.append(Term(A.weight, B, float(scaling), dropout if drops else None))
        return terms

    def __repr__(self) -> str:
        return "moe_qlora." + nn.Module.__repr__(self)


def _dropped(x: torch.Tensor, term: Term, dtype: torch.dtype) -> torch.Tensor | None:
    return None if term.dropout is None else term.dropout(x.to(dtype))


_LINEAR = (nn.Linear,)


def is_plain(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a module is of one of the classes and has no hooks, which may shard, offload or observe it."""
    return (
        type(module) in kinds
        and not module._forward_pre_hooks
        and not module._forward_hooks
        and not module._backward_pre_hooks
        and not module._backward_hooks
        and "forward" not in module.__dict__  # replaced by accelerate's hooks
    )


class LoraLinear(FastForward, lora.Linear):
    """PEFT's `lora.Linear` on a frozen `nn.Linear`."""

    def base(self, x: torch.Tensor) -> Base | None:
        layer = self.base_layer
        if not is_plain(layer, _LINEAR):
            return None
        weight, dtype = layer.weight, linear_dtype(x)
        # another dtype of the weight is an error outside of autocast, and for fp64 under autocast
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
        if not layer.compute_type_is_set:  # as in the layer's own forward
            layer.set_compute_type(x)
            layer.compute_type_is_set = True
        dtype = layer.compute_dtype or x.dtype
        # outside of autocast, PEFT multiplies wider activations with the factors without a cast
        is_narrower = dtype.itemsize < x.dtype.itemsize and not torch.is_autocast_enabled(x.device.type)
        if is_narrower or torch.float64 in (dtype, x.dtype):
            return None
        return Base(matrix, partial(four_bit_matrix, layer), dtype, x.dtype)


def four_bit_matrix(layer: StoredLinear4bit) -> StoredMatrix | None:
    """The weight of a layer as a matrix in a `FourBitFormat`, without a copy; None if no such format fits."""
    weight, shape = layer.weight, (layer.out_features, layer.in_features)
    state = getattr(weight, "quant_state", None)
    if state is None:
        state = layer.quant_state  # sharding replaces the parameter by one without it
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
    """Changes the class of a PEFT layer to the one with the fast forward, if there is one; returns the layer."""
    if type(layer) is lora.Linear and type(layer.base_layer) is nn.Linear:
        layer.__class__ = LoraLinear
    elif type(layer) is lora.Linear4bit and _has_known_scales(layer.base_layer):
        layer.__class__ = LoraLinear4bit
    return layer


def _has_known_scales(layer: nn.Module) -> bool:
    """Whether nested scales, if any, use the code map of bitsandbytes; checkpoints may contain another one."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None or not state.nested:  # without a state, bitsandbytes quantizes on the move to a GPU
        return True
    code = state.state2.code
    return not code.is_meta and torch.equal(code, dynamic_map(code.device))
