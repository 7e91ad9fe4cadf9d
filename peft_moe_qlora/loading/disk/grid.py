"""Codes with a grid of scales, read unchanged: shared by the layouts of formats with blocks of rows and columns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch

from ...quantization.block_scaled import SCALE_LIMIT, BlockScaled
from ..checkpoint import Checkpoint, CheckpointError, TensorInfo
from .base import Group, PackedTensor

KIND_OF_SCALE = {"F32": "fp32", "BF16": "bf16", "F16": "fp16", "F8_E8M0": "e8m0", "U8": "e8m0"}
"""dtype of a file -> kind of scale. Bytes are powers of two (OCP MX 1.0), which torch once had no dtype for."""

PLACEHOLDER_BLOCKS = 8
"""A quantizer that finds a scale of exactly 1 for more blocks than this has not looked at the weights."""

_LIKELY = (1e-5, 10.0)
"""Between which the median magnitude of the weights of any model is."""
_SAMPLED = (64, 256)
"""Rows and columns that the median is taken from."""


@dataclass(frozen=True)
class GridTensor(PackedTensor):
    """A weight whose codes are one tensor and whose scales another.

    Args:
        key: likewise.
        shape: of the weight, not of its codes.
        storage: likewise.
        keys: likewise.
        codes: as in the file, one byte per element.
        scales: likewise.
        parts: matrices stacked along the rows that one is made of, each with its own grid.
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
        """The file's tensors, in the order of the format's."""
        return self.codes, self.scales

    def turned(self, codes: torch.Tensor) -> torch.Tensor:
        """Converts the file's codes to the format's, and back."""
        return codes

    def read(self, checkpoint: Checkpoint, expert: int | None = None) -> dict[str, torch.Tensor]:
        """Codes and scales, bit for bit.

        Raises:
            CheckpointError: a code is not a number, or no quantizer writes such a scale.
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
                f"{self.scales}{_of(expert)} has scales up to {float(scales.max()):.4g}; less than {SCALE_LIMIT:g} "
                "was expected. Download the checkpoint again, or use the one in 16 bits."
            )
        return found

    def write(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Codes and scales in the file's dtypes and shapes.

        Raises:
            CheckpointError: the file has one scale for all parts, which now have several.
        """
        found = {}
        for bits, info in zip(tensors.values(), self.stored):
            shape = info.shape[len(self.shape) - 2 :]
            flat = (self.turned(bits) if info is self.codes else bits).contiguous().flatten()
            dtype = info.dtype or torch.uint8
            numel = math.prod(shape) * dtype.itemsize // flat.itemsize
            if numel < flat.numel() and (flat != flat[0]).any():
                raise CheckpointError(
                    f"{info} has one scale for gate and up projection, but their merged weights need two. Merge into "
                    "16 bits."
                )
            found[info.key] = flat[:numel].view(dtype).view(shape)
        return found

    def _check_codes(self, codes: torch.Tensor, expert: int | None) -> None:
        if any((codes == code).any() for code in _codes_that_are_nan(self.storage)):
            raise CheckpointError(
                f"{self.codes}{_of(expert)} has codes that are NaN; finite ones were expected. The checkpoint is "
                "broken, or its codes are of another type than it says: download it again, or use the one in 16 bits."
            )

    def _check_scales(self, codes: torch.Tensor, scales: torch.Tensor, expert: int | None) -> None:
        where, again = f"{self.scales}{_of(expert)}", "Download the checkpoint again, or use the one in 16 bits."
        if not torch.isfinite(scales).all():
            raise CheckpointError(f"{where} has scales that are NaN or infinite; finite ones were expected. {again}")
        if (scales == torch.finfo(torch.float32).min).any():
            raise CheckpointError(
                f"{where} has scales of {float(scales.min()):.4g}, by which vLLM marks those that are not set; "
                f"positive ones were expected. {again}"
            )
        if (scales < 0).any():
            raise CheckpointError(f"{where} has negative scales; positive ones were expected. {again}")
        rows, columns = self.shape[-2:]
        if (scales == 0).any():
            of_weights = self.storage.scale_of_weights(scales, rows, columns, self.parts)
            if (self._values(codes)[of_weights == 0] != 0).any():
                raise CheckpointError(
                    f"{where} has scales of 0 for weights whose codes in {self.codes.key} are not 0; positive ones "
                    f"were expected. {again}"
                )
        if scales.numel() > PLACEHOLDER_BLOCKS and (scales == 1).all() and self._values(codes).any():
            raise CheckpointError(
                f"{where} has a scale of exactly 1 for each of its {scales.numel()} blocks, which is what tools put "
                f"where they have none; those of the weights were expected. {again}"
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
                f"{self.codes}{_of(expert)} decodes to weights of {median:.2g} in the middle; {_LIKELY[0]:g} to "
                f"{_LIKELY[1]:g} was expected. Codes are multiplied by {self.scales.key}, which seems to hold "
                "reciprocals, or to be of another weight. Use a checkpoint whose scales multiply, or the one in 16 "
                "bits."
            )

    def _values(self, codes: torch.Tensor) -> torch.Tensor:
        return self.storage.values(self.storage.codes_of_bytes(codes))


def scale_kind(weight: TensorInfo, scales: TensorInfo) -> str:
    """The kind of a tensor of scales.

    Raises:
        CheckpointError: its dtype is not one of scales.
    """
    kind = KIND_OF_SCALE.get(scales.dtype_name)
    if kind is None:
        raise CheckpointError(
            f"{scales}, the scales of {weight.key}, is in a storage that is not known for scales; one of "
            f"{', '.join(KIND_OF_SCALE)} was expected. Use the checkpoint in 16 bits."
        )
    return kind


def only_scale(weight: TensorInfo, group: Group, endings: tuple[str, ...]) -> TensorInfo:
    """The one tensor of scales that a weight has.

    Raises:
        CheckpointError: there is none, or there are two.
    """
    found = [group.tensors[ending] for ending in endings if ending in group.tensors]
    if not found:
        names = " or ".join(_key_of_scale(group.key, ending) for ending in endings)
        raise CheckpointError(
            f"{weight} has no scales beside it, without which it can't be decoded: {names} was expected. The "
            "checkpoint is incomplete; download it again, or use the one in 16 bits."
        )
    if len(found) > 1:
        raise CheckpointError(
            f"{weight} has scales twice, {found[0]} and {found[1]}; one of them was expected. Remove the one that is "
            "left over from a conversion."
        )
    return found[0]


def check_matrix(weight: TensorInfo) -> None:
    """Rejects a tensor that is neither a matrix nor one matrix per expert.

    Raises:
        CheckpointError: names the tensor.
    """
    if len(weight.shape) not in (2, 3) or weight.numel == 0:
        raise CheckpointError(f"{weight}: one matrix, or one of each expert, was expected.")


def _key_of_scale(plain: str, ending: str) -> str:
    return plain.removesuffix(".weight") + ending if ending.startswith(".") else plain + ending


def _of(expert: int | None) -> str:
    return "" if expert is None else f", expert {expert},"


@cache
def _codes_that_are_nan(storage: BlockScaled) -> tuple[int, ...]:
    codes = torch.arange(2 ** (8 // storage.codes_per_byte), dtype=torch.uint8)
    return tuple(codes[storage.values(codes).isnan()].tolist())
