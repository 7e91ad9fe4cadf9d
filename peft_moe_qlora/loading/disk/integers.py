"""Integer layouts of compressed-tensors: one byte per integer, or several packed into an int32.

- `int-quantized`: `NAME.weight` I8 `(out, in)`.
- `pack-quantized`: `NAME.weight_packed` I32 `(out, in / 8)` for 4 bits, `(out, in / 4)` for 8 bits, with the first
  column in the lowest bits. Integers are stored unsigned, with an offset of half the range. `NAME.weight_shape` is
  `(out, in)`.

`NAME.weight_scale` is `(out, 1)` per channel, `(1,)` per tensor, or one scale per group of columns or per block. A
weight is integer times scale. Scales of inputs (`input_scale`) are ignored. Zero points and reordered columns are not
supported: formats here are symmetric, with groups of consecutive columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...quantization.block_scaled import BlockScaled
from ...quantization.formats import Int4Format, Int8Format
from ..checkpoint import Checkpoint, CheckpointError, TensorInfo
from .base import DiskLayout, Group, Scheme
from .grid import GridTensor, only_scale, scale_kind

_SIZES = {"channel": (1, 0), "tensor": (0, 0)}
_STRATEGIES = (*_SIZES, "group", "block")
_INSTEAD = "Use a checkpoint of this model in another storage, or the 16-bit checkpoint."
_BESIDE = {
    ".weight_zero_point": ".weight",
    ".weight_g_idx": ".weight",
    ".input_scale": ".weight",
    ".input_zero_point": ".weight",
    ".weight_scale": ".weight",
    ".weight_shape": ".weight",
    ".weight_packed": ".weight",
}
_REFUSED = {
    ".weight_zero_point": "zero points of weights (asymmetric quantization)",
    ".weight_g_idx": "reordered columns with groups that are not contiguous (actorder)",
}


class Int8Layout(DiskLayout):
    """int8 of compressed-tensors, one byte per code.

    Args:
        schemes: as in `DiskLayout`.

    Raises:
        CheckpointError: a scheme has zero points, or an invalid block size.
    """

    endings: ClassVar[dict[str, str]] = _BESIDE
    describing: ClassVar[tuple[str, ...]] = (".weight_scale",)

    def __init__(self, schemes: list[Scheme]) -> None:
        super().__init__(schemes)
        self.blocks = _blocks(schemes)

    @classmethod
    def reads(cls, scheme: Scheme) -> bool:
        return _is_of(scheme, 8, "int-quantized")

    def codes_of(self, group: Group) -> str | None:
        info = group.tensors.get("")
        return group.key if info is not None and info.dtype_name == "I8" and group.key.endswith(".weight") else None

    def packed_tensor(self, checkpoint: Checkpoint, group: Group, parts: int = 1) -> GridTensor:
        weight = group.tensors[""]
        if len(weight.shape) != 2 or weight.numel == 0:
            raise CheckpointError(f"{weight}: expected one matrix (out, in). {_INSTEAD}")
        scales, kind = _scales_of(weight, group, self.describing)
        shapes = {Int8Format(block, kind): weight.shape for block in self.blocks}
        storage = _fitting(weight, shapes, scales, parts)
        return GridTensor(group.key, weight.shape, storage, group.keys, weight, scales, parts)


@dataclass(frozen=True, kw_only=True)
class PackedIntegers(GridTensor):
    """A weight with several integers packed into an int32.

    Args:
        shape_info: header of the tensor that contains the shape of the weight.
        num_bits: number of bits per integer.
    """

    shape_info: TensorInfo
    num_bits: int

    def turned(self, codes: torch.Tensor) -> torch.Tensor:
        return codes ^ 128 if self.num_bits == 8 else codes  # offset of 128 <-> two's complement

    def read(self, checkpoint: Checkpoint, expert: int | None = None) -> dict[str, torch.Tensor]:
        """Reads codes and scales.

        Raises:
            CheckpointError: as in `GridTensor.read`, or `weight_shape` contains another shape.
        """
        found = checkpoint.read(self.shape_info.key).tolist()
        if found != list(self.shape):
            raise CheckpointError(
                f"{self.shape_info} has the shape {found} for {self.codes}. Expected {list(self.shape)}, with "
                f"{32 // self.num_bits} columns per int32; rows that end within an int32 are not supported. {_INSTEAD}"
            )
        return super().read(checkpoint, expert)

    def write(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            **super().write(tensors),
            self.shape_info.key: torch.tensor(self.shape, dtype=self.shape_info.dtype),
        }


class PackedIntegersLayout(DiskLayout):
    """int4 and int8 of compressed-tensors, packed into int32.

    Args:
        schemes: as in `DiskLayout`.

    Raises:
        CheckpointError: a scheme has zero points, reordered columns, or an invalid block size.
    """

    endings: ClassVar[dict[str, str]] = _BESIDE
    describing: ClassVar[tuple[str, ...]] = (".weight_scale", ".weight_shape")

    def __init__(self, schemes: list[Scheme]) -> None:
        super().__init__(schemes)
        _blocks(schemes)
        self.blocks = list(dict.fromkeys((scheme["num_bits"], _block(scheme)) for scheme in schemes))

    @classmethod
    def reads(cls, scheme: Scheme) -> bool:
        if _is_of(scheme, 4, "pack-quantized"):
            return scheme["strategy"] in ("channel", "group")
        return _is_of(scheme, 8, "pack-quantized")

    def codes_of(self, group: Group) -> str | None:
        info = group.tensors.get(".weight_packed")
        return info.key if info is not None and info.dtype_name == "I32" else None

    def packed_tensor(self, checkpoint: Checkpoint, group: Group, parts: int = 1) -> PackedIntegers:
        weight = group.tensors[".weight_packed"]
        if "" in group.tensors:
            raise CheckpointError(
                f"{weight} and {group.tensors['']} are both the weight {group.key}. Expected one of them. The "
                "checkpoint is a mixture of two; download it again."
            )
        if len(weight.shape) != 2 or weight.numel == 0:
            raise CheckpointError(f"{weight}: expected one matrix (out, int32 per row). {_INSTEAD}")
        scales, kind = _scales_of(weight, group, (".weight_scale",))
        shape_info = group.tensors.get(".weight_shape")
        if shape_info is None or shape_info.shape != (2,) or shape_info.dtype not in (torch.int32, torch.int64):
            raise CheckpointError(
                f"{weight} has {'no weight_shape' if shape_info is None else shape_info}. Expected I32 or I64 [2] as "
                f"{group.key.removesuffix('.weight')}.weight_shape. The checkpoint is incomplete; download it again, "
                "or use the 16-bit checkpoint."
            )
        rows, integers = weight.shape
        storages = {
            Int4Format(block, kind) if num_bits == 4 else Int8Format(block, kind): num_bits
            for num_bits, block in self.blocks
        }
        storage = _fitting(
            weight, {one: (rows, integers * 32 // bits) for one, bits in storages.items()}, scales, parts
        )
        num_bits = storages[storage]
        return PackedIntegers(
            group.key, (rows, integers * 32 // num_bits), storage, group.keys, weight, scales, parts,
            shape_info=shape_info, num_bits=num_bits,
        )  # fmt: skip


def _is_of(scheme: Scheme, num_bits: int, layout: str) -> bool:
    is_integer = (scheme.get("type"), scheme.get("num_bits"), scheme.get("format")) == ("int", num_bits, layout)
    return scheme["quant_method"] == "compressed-tensors" and is_integer and scheme.get("strategy") in _STRATEGIES


def _blocks(schemes: list[Scheme]) -> list[tuple[int, int]]:
    """Rows and columns that share a scale, 0 for all, of each scheme.

    Raises:
        CheckpointError: a block size is invalid, or the scheme has zero points or reordered columns.
    """
    for scheme in schemes:
        if scheme.get("symmetric") is False:
            raise CheckpointError(
                f"quantization_config has symmetric=False: {_REFUSED['.weight_zero_point']} are not supported. "
                f"{_INSTEAD}"
            )
        if scheme.get("actorder") not in (None, False, "weight", "static"):
            raise CheckpointError(
                f"quantization_config has actorder={scheme['actorder']!r:.200}: {_REFUSED['.weight_g_idx']} are not "
                f"supported. {_INSTEAD}"
            )
    return list(dict.fromkeys(_block(scheme) for scheme in schemes))


def _block(scheme: Scheme) -> tuple[int, int]:
    strategy = scheme["strategy"]
    if strategy in _SIZES:
        return _SIZES[strategy]
    name = "group_size" if strategy == "group" else "block_structure"
    found: Any = scheme.get(name)
    sizes = [1, found] if strategy == "group" else found
    is_pair = isinstance(sizes, (list, tuple)) and len(sizes) == 2
    if not is_pair or not all(type(size) is int and 0 < size <= _LARGEST for size in sizes):
        expected = (
            "the columns of a group, such as 128" if strategy == "group" else "rows and columns, such as [128, 128]"
        )
        raise CheckpointError(
            f"quantization_config has {name}={found!r:.200}. Expected {expected}. Correct config.json as given in the "
            "model card."
        )
    return tuple(sizes)


_LARGEST = 2**20


def _scales_of(weight: TensorInfo, group: Group, endings: tuple[str, ...]) -> tuple[TensorInfo, str]:
    """The scales of a weight, and their kind.

    Raises:
        CheckpointError: there are no scales, they are not floating-point numbers, or the weight has zero points or
            reordered columns.
    """
    for ending, meaning in _REFUSED.items():
        if ending in group.tensors:
            raise CheckpointError(f"{group.tensors[ending]} contains {meaning}, which are not supported. {_INSTEAD}")
    scales = only_scale(weight, group, endings)
    kind = scale_kind(weight, scales)
    if kind == "e8m0":
        raise CheckpointError(
            f"{scales}, the scales of {weight.key}, are powers of two. Expected F32, BF16 or F16 for integers. "
            f"{_INSTEAD}"
        )
    return scales, kind


def _fitting(
    weight: TensorInfo, found: dict[BlockScaled, tuple[int, int]], scales: TensorInfo, parts: int
) -> BlockScaled:
    """The storage format whose grid the scales match.

    Args:
        weight: header of the codes.
        found: storage format -> rows and columns of the weight in this format.
        scales: header of the scales.
        parts: number of parts of the weight.

    Raises:
        CheckpointError: no format matches.
    """
    expected: list[tuple[int, ...]] = []
    for storage, shape in found.items():
        shapes = [(), (1,)] if storage.block == _SIZES["tensor"] else [storage.grid(*shape, parts)]
        if scales.shape in shapes:
            return storage
        expected += shapes
    raise CheckpointError(
        f"{scales} does not match {weight}. Expected {' or '.join(str(list(one)) for one in expected)} for the blocks "
        f"declared in quantization_config ({' or '.join(map(str, found))}). Download the checkpoint again, or correct "
        "config.json."
    )
