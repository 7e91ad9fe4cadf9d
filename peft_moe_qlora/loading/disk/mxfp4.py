"""Published MXFP4 layouts: gpt-oss, the experts of DeepSeek-V4, and `mxfp4-pack-quantized` of compressed-tensors.

Codes are e2m1, two per byte with the even column in the low half; 32 columns share an e8m0 scale.

- gpt-oss: `KEY_blocks` U8 `(E, out, in / 32, 16)` and `KEY_scales` U8 `(E, out, in / 32)`. Matrices are `(out, in)`,
  although the class has transposed stacks.
- DeepSeek-V4: `NAME.weight` I8 `(out, in / 2)` and `NAME.scale` F8_E8M0 `(out, in / 32)`; others have both as U8.
- compressed-tensors: `NAME.weight_packed` U8 `(out, in / 2)` and `NAME.weight_scale` U8 `(out, in / 32)`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch

from ...quantization.formats import Mxfp4Format
from ..checkpoint import Checkpoint, CheckpointError
from .base import DiskLayout, Group, Scheme
from .for_engines import EngineLayout, Stored, register_engine_layout
from .grid import GridTensor, check_matrix, only_scale, scale_kind

_STORAGE = Mxfp4Format()
_BLOCK = _STORAGE.block[1]


class Mxfp4Layout(DiskLayout):
    """e2m1 in blocks of 32 columns; recognized by names and dtypes of a weight's tensors.

    Args:
        schemes: as in `DiskLayout`.
    """

    endings: ClassVar[dict[str, str]] = {
        ".weight_packed": ".weight",
        "_blocks": "",
        "_scales": "",
        "_scale_inv": "",
        ".scale": ".weight",
        "_scale": "",
    }
    describing: ClassVar[tuple[str, ...]] = ("_scales", "_scale_inv", ".scale", "_scale")

    def __init__(self, schemes: list[Scheme]) -> None:
        super().__init__(schemes)
        # compressed-tensors uses the name `weight` for other integers
        self.has_plain_names = any(scheme["quant_method"] != "compressed-tensors" for scheme in schemes)

    @classmethod
    def reads(cls, scheme: Scheme) -> bool:
        if scheme["quant_method"] == "compressed-tensors":
            group = (scheme.get("type"), scheme.get("num_bits"), scheme.get("group_size"))
            return group == ("float", 4, _BLOCK) and scheme.get("format") == "mxfp4-pack-quantized"
        # 8-bit checkpoints may have 4-bit experts (expert_dtype: fp4)
        return scheme["quant_method"] in ("mxfp4", "fp8", "mxfp8")

    def codes_of(self, group: Group) -> str | None:
        for ending in ("_blocks", ".weight_packed"):
            if ending in group.tensors:
                return group.tensors[ending].key
        info = group.tensors.get("")
        if info is None or not self.has_plain_names or not group.key.endswith(".weight"):
            return None
        return group.key if info.dtype_name in ("I8", "U8") else None

    def packed_tensor(self, checkpoint: Checkpoint, group: Group, parts: int = 1) -> GridTensor:
        ending = next(one for one in ("_blocks", ".weight_packed", "") if one in group.tensors)
        weight = group.tensors[ending]
        if ending and "" in group.tensors:
            raise CheckpointError(
                f"{weight} and {group.tensors['']} are both the weight {group.key}. Expected one of them. The "
                "checkpoint is a mixture of two; download it again."
            )
        is_blocked = ending == "_blocks"
        if weight.dtype_name not in ("U8", "I8") or (is_blocked and len(weight.shape) != 4):
            expected = "(E, out, in / 32, 16)" if is_blocked else "(out, in / 2)"
            raise CheckpointError(
                f"{weight} is not a weight with two codes per byte. Expected U8 {expected}. Use the 16-bit checkpoint."
            )
        if is_blocked:
            *leading, num_blocks, half = weight.shape
            columns = 2 * num_blocks * half
        else:
            check_matrix(weight)
            *leading, half_of_row = weight.shape
            columns, half = 2 * half_of_row, _BLOCK // 2
        if columns % _BLOCK or half != _BLOCK // 2 or weight.numel == 0:
            raise CheckpointError(
                f"{weight} does not consist of complete blocks. Expected blocks of {_BLOCK} columns in 16 bytes. "
                "Download the checkpoint again."
            )
        scales = only_scale(weight, group, ("_scales",) if is_blocked else self.describing[1:])
        if scale_kind(weight, scales) != _STORAGE.scale or scales.shape != (*leading, columns // _BLOCK):
            raise CheckpointError(
                f"{scales} does not match {weight}. Expected U8 or F8_E8M0 {[*leading, columns // _BLOCK]}, one power "
                f"of two per {_BLOCK} columns. Download the checkpoint again, or use the 16-bit checkpoint."
            )
        return GridTensor(group.key, (*leading, columns), _STORAGE, group.keys, weight, scales, parts)


@register_engine_layout
class Mxfp4ForEngines(EngineLayout):
    """The layout of gpt-oss, the only class for which engines read it; only experts are quantized."""

    name: ClassVar[str] = "mxfp4"
    storage: ClassVar[Mxfp4Format] = _STORAGE

    def stored(self, key: str, rows: int, columns: int) -> dict[str, tuple[str, Stored]]:
        num_blocks = columns // _BLOCK
        return {
            "codes": (f"{key}_blocks", Stored((rows, num_blocks, _BLOCK // 2), torch.uint8)),
            "block_scales": (f"{key}_scales", Stored((rows, num_blocks), torch.uint8)),
        }

    def keys_of_stack(self, class_name: str, key: str, parts: int) -> list[str] | None:
        return [key] if class_name == "GptOssExperts" else None

    def takes_single_experts(self, class_name: str) -> bool:
        return False

    def why_not(self, rows: int, columns: int) -> str | None:
        return f"{columns} is not a multiple of {_BLOCK}" if columns % _BLOCK else None

    def config(self, kept: Iterable[str]) -> dict[str, Any]:
        return {"quant_method": "mxfp4", "modules_to_not_convert": list(kept)}
