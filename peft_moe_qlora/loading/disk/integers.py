"""Whole numbers as compressed-tensors publishes them: `int-quantized`, a byte each.

`NAME.weight` I8 `(out, in)`, `NAME.weight_scale` `(out, 1)` per channel, `(1,)` per tensor, or one for each group of
columns or each block. A weight is code times scale; scales of inputs (`input_scale`) are not of weights. Zero points
are not read: a format here is symmetric.
"""

from __future__ import annotations

from typing import Any, ClassVar

from ...quantization.block_scaled import BlockScaled
from ...quantization.formats import Int8Format
from ..checkpoint import Checkpoint, CheckpointError, TensorInfo
from .base import DiskLayout, Group, Scheme
from .grid import GridTensor, only_scale, scale_kind

_SIZES = {"channel": (1, 0), "tensor": (0, 0)}
_STRATEGIES = (*_SIZES, "group", "block")
_INSTEAD = "Use a checkpoint of this model in another storage, or the one in 16 bits."
_BESIDE = {
    ".weight_zero_point": ".weight",
    ".weight_g_idx": ".weight",
    ".input_scale": ".weight",
    ".input_zero_point": ".weight",
    ".weight_scale": ".weight",
}
_REFUSED = {
    ".weight_zero_point": "zero points of weights, which stand for values that are not symmetric around 0",
    ".weight_g_idx": "columns in another order (actorder), which have no blocks",
}


class Int8Layout(DiskLayout):
    """int8 by compressed-tensors, a byte to a code.

    Args:
        schemes: likewise.

    Raises:
        CheckpointError: a scheme has zero points, or blocks of no size.
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
            raise CheckpointError(f"{weight}: one matrix (out, in) was expected.")
        scales, kind = _scales_of(weight, group, self.describing)
        storages = [Int8Format(block, kind) for block in self.blocks]
        storage = _fitting(weight, weight.shape, scales, storages, parts)
        return GridTensor(group.key, weight.shape, storage, group.keys, weight, scales, parts)


def _is_of(scheme: Scheme, num_bits: int, layout: str) -> bool:
    is_integer = (scheme.get("type"), scheme.get("num_bits"), scheme.get("format")) == ("int", num_bits, layout)
    return scheme["quant_method"] == "compressed-tensors" and is_integer and scheme.get("strategy") in _STRATEGIES


def _blocks(schemes: list[Scheme]) -> list[tuple[int, int]]:
    """Rows and columns that share a scale, 0 for all, of each scheme.

    Raises:
        CheckpointError: they are no sizes, or codes are not all that values are made of.
    """
    for scheme in schemes:
        if scheme.get("symmetric") is False:
            raise CheckpointError(
                f"quantization_config has symmetric=False: {_REFUSED['.weight_zero_point']}; they are not read. "
                f"{_INSTEAD}"
            )
        if scheme.get("actorder") not in (None, False, "weight", "static"):
            raise CheckpointError(
                f"quantization_config has actorder={scheme['actorder']!r:.200}: {_REFUSED['.weight_g_idx']}; they are "
                f"not read. {_INSTEAD}"
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
        expected = "columns of a group, such as 128," if strategy == "group" else "rows and columns, such as [128, 128],"
        raise CheckpointError(
            f"quantization_config has {name}={found!r:.200}; {expected} were expected. Correct config.json, as the "
            "model card has it."
        )
    return tuple(sizes)


_LARGEST = 2**20


def _scales_of(weight: TensorInfo, group: Group, endings: tuple[str, ...]) -> tuple[TensorInfo, str]:
    """The scales of a weight, and their kind.

    Raises:
        CheckpointError: there are none, they are no floating numbers, or values are made of more than them.
    """
    for ending, meaning in _REFUSED.items():
        if ending in group.tensors:
            raise CheckpointError(f"{group.tensors[ending]} holds {meaning}; they are not read. {_INSTEAD}")
    scales = only_scale(weight, group, endings)
    kind = scale_kind(weight, scales)
    if kind == "e8m0":
        raise CheckpointError(
            f"{scales}, the scales of {weight.key}, are powers of two; F32, BF16 or F16 was expected beside whole "
            f"numbers. {_INSTEAD}"
        )
    return scales, kind


def _fitting(
    weight: TensorInfo, shape: tuple[int, ...], scales: TensorInfo, storages: list[BlockScaled], parts: int
) -> BlockScaled:
    """The storage whose grid the scales of a `(rows, columns)` matrix are.

    Raises:
        CheckpointError: there is none.
    """
    expected: list[tuple[int, ...]] = []
    for storage in storages:
        shapes = [(), (1,)] if storage.block == _SIZES["tensor"] else [storage.grid(*shape, parts)]
        if scales.shape in shapes:
            return storage
        expected += shapes
    blocks = " or ".join(str(storage) for storage in storages)
    raise CheckpointError(
        f"{scales} doesn't fit {weight}: with the blocks that quantization_config declares ({blocks}), "
        f"{' or '.join(str(list(one)) for one in expected)} was expected. Download the checkpoint again, or correct "
        "config.json."
    )
