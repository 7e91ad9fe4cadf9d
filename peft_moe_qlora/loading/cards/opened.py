"""A checkpoint opened by its config and headers alone: its model, and the source of each stack."""

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
    """What `open` found.

    Args:
        model: on the meta device.
        checkpoint: its headers.
        finder: that has assigned tensors to stacks.
        sources: path -> projection -> source.
        saved: the configuration that this package has saved it with; None for other checkpoints.
        quantization: `quantization_config` in its config.json; None for none.
    """

    model: PreTrainedModel
    checkpoint: Checkpoint
    finder: SourceFinder
    sources: Sources
    saved: MoeQuantizationConfig | None
    quantization: dict[str, Any] | None

    @classmethod
    def open(cls, directory: str | Path) -> OpenedCheckpoint:
        """Reads no weight.

        Raises:
            CheckpointError: see `readable_quantization`, `Checkpoint` and `SourceFinder`.
            ValueError: the model has no routed experts, or of a class that is not supported.
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
        """`quant_method`, None for a checkpoint that is not quantized."""
        return None if self.quantization is None else quant_method(self.quantization)

    def empty_stack(self, source: Source, storage: Format | None) -> Stack:
        """A stack as it is loaded, on the meta device.

        Args:
            source: of it.
            storage: format for experts in floating point.
        """
        # weights that a quantized checkpoint has in 16 bits stay in 16 bits
        is_left = self.quantization is not None and isinstance(source, DenseSource)
        of_source = self.saved.format if isinstance(source, NativeSource) else None if is_left else storage
        stack = source.empty_stack(of_source, DTYPE)
        if isinstance(source, NativeSource):
            source.check(stack, self.checkpoint)
        return stack

    def packed_weights(self, double_quant: bool = False) -> dict[str, int]:
        """Name of a weight -> bytes, of those beside the experts that the checkpoint has packed.

        Args:
            double_quant: what bitsandbytes has packed has its scales in 8 bits.
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
        """See `packed_weights` for the argument."""
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
    """The model of a config, on the meta device.

    Raises:
        ValueError: transformers has no such class, or its experts are not supported.
    """
    with torch.device("meta"):
        model = class_of(config)._from_config(config)
    refuse_unsupported(model)
    return model
