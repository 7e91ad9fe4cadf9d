"""A checkpoint opened from its config and headers only: its model, and the source of each stack."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ...experts import refuse_unsupported
from ...quantization import Format, Stack, parse_format
from ..checkpoint import Checkpoint
from ..disk import quant_method
from ..finder import SourceFinder
from ..load import class_of, read_config, readable_quantization, saved_config
from ..quantization_config import QUANT_METHOD, MoeQuantizationConfig
from ..quantizer import refuse_unexplained
from ..sources import DenseSource, NativeSource, Source, Sources
from .sizes import DTYPE, ModelSizes, format_nbytes, four_bit_nbytes, sizes_of


@dataclass(frozen=True)
class OpenedCheckpoint:
    """Result of `open`.

    Args:
        model: model on the meta device.
        checkpoint: checkpoint of the model.
        finder: finder that mapped tensors to stacks.
        sources: path -> projection -> source.
        saved: configuration of a checkpoint saved by this package; None for other checkpoints.
        quantization: `quantization_config` of the checkpoint; None for an unquantized one.
    """

    model: PreTrainedModel
    checkpoint: Checkpoint
    finder: SourceFinder
    sources: Sources
    saved: MoeQuantizationConfig | None
    quantization: dict[str, Any] | None

    @classmethod
    def open(cls, directory: str | Path) -> OpenedCheckpoint:
        """Opens a checkpoint without reading weights.

        Raises:
            CheckpointError: see `readable_quantization`, `Checkpoint` and `SourceFinder`.
            ValueError: the model has no routed experts, or the class of the experts is not supported.
        """
        config = read_config(directory)
        quantization = readable_quantization(config, directory)
        saved = saved_config(Path(directory))
        checkpoint = Checkpoint.open(directory)
        model = empty_model(config)
        finder = SourceFinder(model, checkpoint, (saved and saved.flipped_stacks) or ())
        sources = finder.find()
        refuse_unexplained(sources, saved, directory)
        if not sources:
            raise ValueError(f"{directory}: {type(model).__name__} has no routed experts.")
        return cls(model, checkpoint, finder, sources, saved, quantization)

    @property
    def method(self) -> str | None:
        """`quant_method`, None for an unquantized checkpoint."""
        return None if self.quantization is None else quant_method(self.quantization)

    def empty_stack(self, source: Source, storage: Format | None) -> Stack:
        """An empty stack on the meta device, as `load_quantized` would create it.

        Args:
            source: source of the stack.
            storage: storage format for experts in floating point.
        """
        # weights that a quantized checkpoint has in 16 bits stay in 16 bits
        is_left = self.quantization is not None and isinstance(source, DenseSource)
        of_source = self.saved.format if isinstance(source, NativeSource) else None if is_left else storage
        stack = source.empty_stack(of_source, DTYPE)
        if isinstance(source, NativeSource):
            source.check(stack, self.checkpoint)
        return stack

    def packed_weights(self, double_quant: bool = False) -> dict[str, int]:
        """Name -> bytes of the weights outside the experts that are packed in the checkpoint.

        Args:
            double_quant: whether weights packed by bitsandbytes have 8-bit scales.
        """
        found = {}
        if self.quantization is not None:
            packed = self.finder.packed_names()
            for path, module in self.model.named_modules():
                if f"{path}.weight" in packed:
                    found[f"{path}.weight"] = four_bit_nbytes(tuple(module.weight.shape), double_quant)
        for name, packed in self.finder.packed_beside.items():
            found[name] = format_nbytes(packed.shape, packed.storage)
        if self.saved is not None and self.saved.linear_storage is not None:
            storage = parse_format(self.saved.linear_storage)
            for path in self.finder.saved_linear(self.model, storage):
                layer = self.model.get_submodule(path)
                found[f"{path}.weight"] = format_nbytes((layer.out_features, layer.in_features), storage)
        return found

    def sizes(self, double_quant: bool = False) -> ModelSizes:
        """The sizes of the model. See `packed_weights` for the argument."""
        stacks = {
            source.target.name: self.empty_stack(source, None)
            for of_module in self.sources.values()
            for source in of_module.values()
            if self.quantization is not None or not isinstance(source, DenseSource)
        }
        stored = {name: stack.nbytes for name, stack in stacks.items()}
        formats = {stack.storage for stack in stacks.values()}
        packed_as = formats.pop() if len(formats) == 1 else None
        may_repack = self.method not in (None, "bitsandbytes", QUANT_METHOD)
        keeps_linear = self.quantization is not None and not may_repack
        packed = self.packed_weights(double_quant)
        return sizes_of(self.model, stored, packed, keeps_linear, may_repack, packed_as)


def empty_model(config: Any) -> PreTrainedModel:
    """Creates the model of a config on the meta device.

    Raises:
        ValueError: transformers does not have the class, or its experts are not supported.
    """
    with torch.device("meta"):
        model = class_of(config)._from_config(config)
    refuse_unsupported(model)
    return model
