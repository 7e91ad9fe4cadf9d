"""The sizes that determine the memory of a model in training, computed without reading weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ...experts import ExpertsLayout
from ...quantization import Format, FourBitFormat
from ...targets import expert_layouts, is_router
from ...unadaptable import why_unadaptable
from ..expert_shapes import top_k_of
from ..finder import stack_targets
from ..linear import asked_for_dtype
from ..sources import Target

DTYPE = torch.bfloat16
"""Dtype of unquantized weights."""
_CODE_TABLES = {False: 4 * 16, True: 4 * (16 + 256)}
"""Bytes of the tables that bitsandbytes keeps for each 4-bit layer: for codes, and for nested scales."""


@dataclass(frozen=True)
class StackSize:
    """A stack of experts.

    Args:
        shape, is_transposed, parts: see `Target`.
        stored_nbytes: size of a stack packed in the checkpoint; None for a stack in floating point.
    """

    shape: tuple[int, int, int]
    is_transposed: bool
    parts: int
    stored_nbytes: int | None = None

    def nbytes(self, storage: Format | None, may_repack: bool) -> int:
        """Size of the loaded stack in bytes.

        Args:
            storage: storage format of experts; None for that of the checkpoint, or 16 bits.
            may_repack: whether experts packed in the checkpoint can be requantized.
        """
        if self.stored_nbytes is not None and (storage is None or not may_repack):
            return self.stored_nbytes
        return _nbytes_of_stack(self.shape, self.is_transposed, self.parts, storage)


@lru_cache(maxsize=1024)
def _nbytes_of_stack(shape: tuple[int, int, int], is_transposed: bool, parts: int, storage: Format | None) -> int:
    return Target("", "", shape, is_transposed, DTYPE, parts).empty_stack_as_declared(storage, DTYPE).nbytes


@dataclass(frozen=True)
class ModelSizes:
    """Sizes that determine the memory of a model in training. The values of mappings are counts.

    Args:
        model_class: name of the model class.
        stacks: sizes of the experts stacks.
        layouts: layouts of the experts modules.
        linear: shapes `(out, in)` of linear layers that may be loaded in 4 bits or in 16 bits.
        other_nbytes: bytes of all other weights, which do not depend on settings.
        factors: shapes `(out, in)` of the linear layers that LoRA adapts with `target_modules="all-linear"`.
        top_k: number of experts per token.
        hidden_size, num_layers, vocab_size: sizes of the decoder.
        layer_features: sum of inputs and outputs of all linear layers of a decoder layer; the largest of all layers.
        eager_heads: number of heads if attention scores are materialized; 0 with SDPA.
        may_repack: whether experts packed in the checkpoint can be requantized.
        packed_as: storage format of experts packed in the checkpoint; None for none, or if they have several.
    """

    model_class: str
    stacks: Mapping[StackSize, int]
    layouts: Mapping[ExpertsLayout, int]
    linear: Mapping[tuple[int, int], int]
    other_nbytes: int
    factors: Mapping[tuple[int, int], int]
    top_k: int
    hidden_size: int
    num_layers: int
    vocab_size: int
    layer_features: int
    eager_heads: int = 0
    may_repack: bool = False
    packed_as: Format | None = None

    @property
    def is_packed(self) -> bool:
        """Whether the checkpoint has quantized experts."""
        return any(stack.stored_nbytes is not None for stack in self.stacks)

    def experts_nbytes(self, storage: Format | None) -> int:
        """Size of all stacks in bytes.

        Raises:
            ValueError: the format does not support the shape of a stack.
        """
        return sum(count * stack.nbytes(storage, self.may_repack) for stack, count in self.stacks.items())

    def linear_nbytes(self, in_4_bits: bool, double_quant: bool) -> int:
        if in_4_bits:
            return sum(count * four_bit_nbytes(shape, double_quant) for shape, count in self.linear.items())
        return sum(count * DTYPE.itemsize * prod(shape) for shape, count in self.linear.items())

    def factor_shapes(self, rank: int, expert_rank: int) -> Counter[tuple[int, ...]]:
        """Shape of a factor -> number of factors, for A and B of linear layers and experts."""
        found: Counter[tuple[int, ...]] = Counter()
        for (out_features, in_features), count in self.factors.items():
            found[rank, in_features] += count
            found[out_features, rank] += count
        for layout, count in self.layouts.items():
            for shape in factors_of(layout, expert_rank):
                found[shape] += count
        return found


def factors_of(layout: ExpertsLayout, rank: int) -> list[tuple[int, ...]]:
    """Shapes of A and B of the projections of an experts module."""
    features = [layout.features(projection) for projection in layout.projections]
    return [
        shape
        for in_features, out_features in features
        for shape in ((layout.num_experts, rank, in_features), (layout.num_experts, out_features, rank))
    ]


def four_bit_nbytes(shape: tuple[int, int], double_quant: bool) -> int:
    """Size in bytes of a 4-bit linear layer of bitsandbytes, in blocks of 64 (QLoRA, section 3)."""
    return format_nbytes(shape, FourBitFormat("nf4", 64, double_quant)) + _CODE_TABLES[double_quant]


def format_nbytes(shape: tuple[int, int], storage: Format) -> int:
    return sum(prod(spec.shape) * spec.dtype.itemsize for spec in storage.tensors(*shape).values())


def quantizable_linear(model: nn.Module) -> dict[str, nn.Linear]:
    """Path -> linear layer, except the head and routers."""
    layouts = expert_layouts(model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and not is_router(name, module, layouts)
    }


def sizes_of(
    model: PreTrainedModel,
    stored: Mapping[str, int] | None = None,
    packed: Mapping[str, int] | None = None,
    keeps_linear: bool = False,
    may_repack: bool = False,
    packed_as: Format | None = None,
) -> ModelSizes:
    """The sizes of a model on the meta device.

    Args:
        model: model with unconverted experts modules.
        stored: name -> bytes of stacks packed in the checkpoint.
        packed: name -> bytes of other weights packed in the checkpoint.
        keeps_linear: whether linear layers are always loaded as stored.
        may_repack, packed_as: see `ModelSizes`.

    Raises:
        ValueError: the model has no routed experts.
    """
    stored, packed = stored or {}, packed or {}
    targets = stack_targets(model)
    if not targets:
        raise ValueError(f"{type(model).__name__} has no routed experts.")
    linear = quantizable_linear(model)
    free = {} if keeps_linear else linear_for_4_bits(model, packed)
    counted = [*(f"{name}.weight" for name in free), *packed]
    elsewhere = (
        sum(parameter.numel() for parameter in model.parameters())
        - sum(prod(target.shape) for target in targets)
        - sum(model.get_parameter(name).numel() for name in counted)
    )
    config = model.config.get_text_config(decoder=True)
    return ModelSizes(
        model_class=type(model).__name__,
        stacks=Counter(
            StackSize(target.shape, target.is_transposed, target.parts, stored.get(target.name)) for target in targets
        ),
        layouts=Counter(expert_layouts(model).values()),
        linear=Counter(tuple(layer.weight.shape) for layer in free.values()),
        other_nbytes=DTYPE.itemsize * elsewhere + sum(packed.values()),
        factors=Counter(
            (layer.out_features, layer.in_features)
            for name, layer in linear.items()
            if not why_unadaptable(name, model)
        ),
        top_k=top_k_of(config) or 1,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        layer_features=max(map(_linear_features, _decoder_layers(model)), default=0),
        eager_heads=0 if model._supports_sdpa else config.num_attention_heads,
        may_repack=may_repack,
        packed_as=packed_as,
    )


def linear_for_4_bits(model: PreTrainedModel, packed: Iterable[str] = ()) -> dict[str, nn.Linear]:
    """Path -> linear layer, for layers that are quantized to 4 bits when loaded.

    Args:
        model: model with unconverted layers.
        packed: names of weights packed in the checkpoint.
    """
    left_out = {*asked_for_dtype(model), *(name.removesuffix(".weight") for name in packed)}
    return {name: layer for name, layer in quantizable_linear(model).items() if name not in left_out}


def _decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Layers with experts; if none are found, all layers that transformers would checkpoint."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return [layer for layer in layers if expert_layouts(layer)] or layers


def _linear_features(layer: nn.Module) -> int:
    linear = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    return sum(module.in_features + module.out_features for module in linear)
