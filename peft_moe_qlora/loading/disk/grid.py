"""Weights with a grid of scales, which are read unchanged: shared by the layouts of `BlockScaled` formats."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch

from ...quantization.block_scaled import SCALE_LIMIT, BlockScaled
from ..checkpoint import Checkpoint, CheckpointError, TensorInfo
from .base import Group, PackedTensor

KIND_OF_SCALE = {"F32": "fp32", "BF16": "bf16", "F16": "fp16", "F8_E8M0": "e8m0", "U8": "e8m0"}
"""Dtype in a file -> kind of scale. U8 are e8m0 scales (OCP MX 1.0) from before torch had this dtype."""

PLACEHOLDER_BLOCKS = 8
"""If more blocks than this all have a scale of exactly 1, the scales are placeholders."""

_LIKELY = (1e-5, 10.0)
"""Range of the median magnitude of a model's weights."""
_SAMPLED = (64, 256)
"""Number of rows and columns sampled for the median."""


@dataclass(frozen=True)
class GridTensor(PackedTensor):
    """A weight with a tensor of codes and a tensor of scales.

    Args:
        key: as in `PackedTensor`.
        shape: shape of the weight, not of its codes.
        storage: as in `PackedTensor`.
        keys: as in `PackedTensor`.
        codes: header of the codes.
        scales: header of the scales.
        parts: number of matrices stacked along the rows in one matrix, each with a separate grid.
    """

    storage: BlockScaled
    codes: TensorInfo
    scales: TensorInfo
    parts: int = 1

    @property
    def num_parts(self) -> int:
        return self.parts

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """The tensors in the file, in the order of the storage format."""
        return self.codes, self.scales

    def turned(self, codes: torch.Tensor) -> torch.Tensor:
        """Converts codes between file and storage format, in both directions."""
        return codes

    def read(self, checkpoint: Checkpoint, expert: int | None = None) -> dict[str, torch.Tensor]:
        """Reads codes and scales without changing a bit.

        Raises:
            CheckpointError: a code is NaN, or a scale is invalid.
        """
        rows, columns = self.shape[-2:]
        found = {}
        for (name, spec), info in zip(self.storage.tensors(rows, columns, self.parts).items(), self.stored):
            tensor = checkpoint.read(info.key) if expert is None else checkpoint.read_slice(info.key, expert)[0]
            bits = tensor.contiguous().view(spec.dtype)
            bits = self.turned(bits) if info is self.codes else bits
            # all parts may share one scale
            found[name] = bits.expand(spec.shape).contiguous() if bits.numel() == 1 else bits.reshape(spec.shape)
        self._check_codes(found["codes"], expert)
        scales = self.storage.scales({name: bits[None] for name, bits in found.items()})
        scales = scales.view(found["block_scales"].shape)
        self._check_scales(found["codes"], scales, expert)
        self._check_magnitude(found["codes"], scales, expert)
        if (scales >= SCALE_LIMIT).any():
            raise CheckpointError(
                f"{self.scales}{_of(expert)} has scales up to {float(scales.max()):.4g}. Expected less than "
                f"{SCALE_LIMIT:g}. Download the checkpoint again, or use the 16-bit checkpoint."
            )
        return found

    def write(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Converts codes and scales to the dtypes and shapes of the file.

        Raises:
            CheckpointError: the file has one scale for all parts, but the tensors have different ones.
        """
        found = {}
        for bits, info in zip(tensors.values(), self.stored):
            shape = info.shape[len(self.shape) - 2 :]
            flat = (self.turned(bits) if info is self.codes else bits).contiguous().flatten()
            dtype = info.dtype or torch.uint8
            numel = math.prod(shape) * dtype.itemsize // flat.itemsize
            if numel < flat.numel() and (flat != flat[0]).any():
                raise CheckpointError(
                    f"{info} contains one scale for gate and up projection, but the merged weights require two. Merge "
                    "into 16 bits."
                )
            found[info.key] = flat[:numel].view(dtype).view(shape)
        return found

    def _check_codes(self, codes: torch.Tensor, expert: int | None) -> None:
        if any((codes == code).any() for code in _codes_that_are_nan(self.storage)):
            raise CheckpointError(
                f"{self.codes}{_of(expert)} has codes that are NaN. Expected finite values. The checkpoint is "
                "damaged, or its codes have another type than declared. Download it again, or use the 16-bit "
                "checkpoint."
            )

    def _check_scales(self, codes: torch.Tensor, scales: torch.Tensor, expert: int | None) -> None:
        where, again = f"{self.scales}{_of(expert)}", "Download the checkpoint again, or use the 16-bit checkpoint."
        if not torch.isfinite(scales).all():
            raise CheckpointError(f"{where} has scales that are NaN or infinite. Expected finite scales. {again}")
        if (scales == torch.finfo(torch.float32).min).any():
            raise CheckpointError(
                f"{where} has scales of {float(scales.min()):.4g}, the value of vLLM for scales that are not set. "
                f"Expected positive scales. {again}"
            )
        if (scales < 0).any():
            raise CheckpointError(f"{where} has negative scales. Expected positive scales. {again}")
        rows, columns = self.shape[-2:]
        if (scales == 0).any():
            of_weights = self.storage.scale_of_weights(scales, rows, columns, self.parts)
            if (self._values(codes)[of_weights == 0] != 0).any():
                raise CheckpointError(
                    f"{where} has scales of 0 for weights whose codes in {self.codes.key} are not 0. Expected "
                    f"positive scales. {again}"
                )
        if scales.numel() > PLACEHOLDER_BLOCKS and (scales == 1).all() and self._values(codes).any():
            raise CheckpointError(
                f"{where} has a scale of exactly 1 for each of its {scales.numel()} blocks, which tools write as a "
                f"placeholder. Expected scales computed from the weights. {again}"
            )

    def _check_magnitude(self, codes: torch.Tensor, scales: torch.Tensor, expert: int | None) -> None:
        rows, columns = self.shape[-2:]
        block_rows, block_columns = self.storage.block_of(rows, columns, self.parts)
        part_rows = rows // self.parts
        row, column = (
            torch.linspace(0, size - 1, min(size, count)).long() for size, count in zip((rows, columns), _SAMPLED)
        )
        grid = scales.view(self.parts, -1, scales.shape[-1])
        of_sample = grid[row // part_rows, row % part_rows // block_rows][:, column // block_columns]
        sizes = (self._values(codes[row])[:, column] * of_sample).abs()
        sizes = sizes[sizes > 0]
        if sizes.numel() == 0:
            return
        median = float(sizes.median())
        if not _LIKELY[0] <= median <= _LIKELY[1]:
            raise CheckpointError(
                f"{self.codes}{_of(expert)} decodes to weights with a median magnitude of {median:.2g}. Expected "
                f"{_LIKELY[0]:g} to {_LIKELY[1]:g}. The scales in {self.scales.key} are probably reciprocals, or "
                "belong to another weight. Use a checkpoint whose scales multiply the codes, or the 16-bit checkpoint."
            )

    def _values(self, codes: torch.Tensor) -> torch.Tensor:
        return self.storage.values(self.storage.codes_of_bytes(codes))


def scale_kind(weight: TensorInfo, scales: TensorInfo) -> str:
    """The kind of a tensor of scales.

    Raises:
        CheckpointError: the dtype is not supported for scales.
    """
    kind = KIND_OF_SCALE.get(scales.dtype_name)
    if kind is None:
        raise CheckpointError(
            f"{scales}, the scales of {weight.key}, has a dtype that is not supported for scales. Expected one of "
            f"{', '.join(KIND_OF_SCALE)}. Use the 16-bit checkpoint."
        )
    return kind


def only_scale(weight: TensorInfo, group: Group, endings: tuple[str, ...]) -> TensorInfo:
    """The tensor of scales of a weight.

    Raises:
        CheckpointError: there is none, or there are several.
    """
    found = [group.tensors[ending] for ending in endings if ending in group.tensors]
    if not found:
        names = " or ".join(_key_of_scale(group.key, ending) for ending in endings)
        raise CheckpointError(
            f"{weight} has no scales. Expected {names}, which is required to decode it. The checkpoint is incomplete; "
            "download it again, or use the 16-bit checkpoint."
        )
    if len(found) > 1:
        raise CheckpointError(
            f"{weight} has two tensors of scales, {found[0]} and {found[1]}. Expected one of them. Remove the one "
            "that a conversion has left over."
        )
    return found[0]


def check_matrix(weight: TensorInfo) -> None:
    """Rejects a tensor that is neither a matrix nor one matrix per expert.

    Raises:
        CheckpointError: names the tensor.
    """
    if len(weight.shape) not in (2, 3) or weight.numel == 0:
        raise CheckpointError(
            f"{weight}: expected a matrix, or a 3-D tensor of one matrix per expert. Use the 16-bit checkpoint."
        )


def _key_of_scale(plain: str, ending: str) -> str:
    return plain.removesuffix(".weight") + ending if ending.startswith(".") else plain + ending


def _of(expert: int | None) -> str:
    return "" if expert is None else f", expert {expert},"


@cache
def _codes_that_are_nan(storage: BlockScaled) -> tuple[int, ...]:
    codes = torch.arange(2 ** (8 // storage.codes_per_byte), dtype=torch.uint8)
    return tuple(codes[storage.values(codes).isnan()].tolist())
