"""A floating-point view of a checkpoint quantized by another tool: each tensor is dequantized when read."""

from __future__ import annotations

import torch
from torch import nn

from ..quantization import Format
from .checkpoint import Checkpoint, TensorInfo
from .disk import PackedTensor
from .finder import SourceFinder


class DecodedCheckpoint(Checkpoint):
    """Weights under the keys and in the orientation of a 16-bit checkpoint, without scales and other metadata.

    Values are fp32: codes times scales, exact or rounded once.

    Args:
        model: model of the checkpoint, with unconverted experts modules, on any device.
        checkpoint: the quantized checkpoint.

    Raises:
        CheckpointError: see `SourceFinder`; or the metadata of a weight is not supported.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        self._stored = checkpoint
        self.files, self.metadata = checkpoint.files, checkpoint.metadata
        finder = SourceFinder(model, checkpoint)
        self.sources = finder.find()
        index = finder.index
        self._packed: dict[str, PackedTensor] = {}
        self._codes: dict[str, str] = {}
        self._swapped: set[str] = set()
        taken: set[str] = set()
        for key in index.weights():
            target = finder.targets.get(finder.name_of(key))
            is_fused = len(index.info(key).shape) > 2 and target is not None
            packed = index.packed_tensor(key, target.parts if is_fused else 1)
            self._packed[key], self._codes[key] = packed, index.info(key).key
            if is_fused and packed.is_out_in and target.is_transposed:
                self._swapped.add(key)
            taken.update(packed.keys)
        self.tensors = {key: info for key, info in checkpoint.tensors.items() if key not in taken}
        for key, packed in self._packed.items():
            info = checkpoint.tensors[self._codes[key]]
            self.tensors[key] = TensorInfo(key, info.file, self._shape(key, packed), torch.float32, "F32")

    def _shape(self, key: str, packed: PackedTensor) -> tuple[int, ...]:
        *experts, rows, columns = packed.shape
        return (*experts, columns, rows) if key in self._swapped else packed.shape

    def storage_of(self, key: str) -> Format | None:
        packed = self._packed.get(key)
        return None if packed is None else packed.storage

    def scales_of(self, key: str, expert: int | None = None) -> torch.Tensor:
        """`(num_blocks,)` fp32: the scales of a quantized weight, or of one expert of it."""
        packed = self._packed[key]
        found = packed.read(self._stored, expert if len(packed.shape) > 2 else None)
        return packed.storage.scales({name: tensor[None] for name, tensor in found.items()})[0]

    def read(self, key: str) -> torch.Tensor:
        packed = self._packed.get(key)
        if packed is None:
            return self._stored.read(key)
        if len(packed.shape) == 2:
            return self._decoded(packed, None)
        return torch.cat([self.read_slice(key, expert) for expert in range(packed.shape[0])])

    def read_slice(self, key: str, index: int) -> torch.Tensor:
        packed = self._packed.get(key)
        if packed is None:
            return self._stored.read_slice(key, index)
        matrix = self._decoded(packed, index)
        return (matrix.T.contiguous() if key in self._swapped else matrix)[None]

    def _decoded(self, packed: PackedTensor, expert: int | None) -> torch.Tensor:
        found = packed.read(self._stored, expert)
        stored = {name: tensor[None] for name, tensor in found.items()}
        return packed.storage.dequantize(stored, *packed.shape[-2:], torch.float32, packed.num_parts)[0]

    def position(self, key: str) -> tuple[int, int]:
        return self._stored.position(self._codes.get(key, key))


def without_quantization(config: dict) -> dict:
    """The config.json of the same checkpoint in floating point."""
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    return {key: without_quantization(value) if isinstance(value, dict) else value for key, value in kept.items()}
