"""Published NVFP4 layouts: ModelOpt, and `nvfp4-pack-quantized` of compressed-tensors.

Codes are e2m1, two per byte with the even column in the low half. `NAME.weight_scale` F8_E4M3 `(out, in / 16)`
contains the scales of 16 columns each, and a second F32 scale applies to the matrix:

- ModelOpt: `NAME.weight` U8 `(out, in / 2)`, and `NAME.weight_scale_2` `()`, which multiplies.
- compressed-tensors: `NAME.weight_packed` U8 `(out, in / 2)`, and `NAME.weight_global_scale` `(1,)`, which divides.

Scales of inputs (`input_scale`, `input_global_scale`) are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...quantization.formats import Nvfp4Format
from ..checkpoint import Checkpoint, CheckpointError, TensorInfo
from .base import DiskLayout, Group, Scheme
from .grid import PLACEHOLDER_BLOCKS, GridTensor, only_scale

_BLOCK = 16
_ONE = 0x38
"""1 in e4m3."""
_OF_GLOBAL = {"": ".weight_scale_2", ".weight_packed": ".weight_global_scale"}
"""Ending of the codes' key -> ending of the second scale's key."""
_AGAIN = "Download the checkpoint again, or use the 16-bit checkpoint."


@dataclass(frozen=True, kw_only=True)
class Nvfp4Tensor(GridTensor):
    """A weight with a second scale.

    Args:
        global_scale: header of the second scale.
    """

    global_scale: TensorInfo

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        return self.codes, self.scales, self.global_scale

    def read(self, checkpoint: Checkpoint, expert: int | None = None) -> dict[str, torch.Tensor]:
        """Reads codes and both levels of scales without changing a bit.

        Raises:
            CheckpointError: as in `GridTensor.read`, or the second scale is invalid.
        """
        whole = float(checkpoint.read(self.global_scale.key))
        if not 0 < whole < torch.inf:
            raise CheckpointError(
                f"{self.global_scale} is {whole:.4g}. Expected a positive number, which "
                f"{'divides' if self.storage.is_inverse else 'multiplies'} all scales of {self.codes.key}. {_AGAIN}"
            )
        found = super().read(checkpoint, expert)
        blocks = found["block_scales"]
        if blocks.numel() > PLACEHOLDER_BLOCKS and (blocks == _ONE).all() and self._values(found["codes"]).any():
            raise CheckpointError(
                f"{self.scales} has a scale of exactly 1 for each of its {blocks.numel()} blocks, which tools write "
                f"as a placeholder. Expected scales computed from the weights. {_AGAIN}"
            )
        return found


class Nvfp4Layout(DiskLayout):
    """e2m1 in blocks of 16 columns with a second scale; recognized by names and dtypes of a weight's tensors.

    Args:
        schemes: as in `DiskLayout`.
    """

    endings: ClassVar[dict[str, str]] = dict.fromkeys(
        (
            ".weight_packed",
            ".weight_scale_2",
            ".weight_global_scale",
            ".weight_scale",
            ".pre_quant_scale",
            ".input_scale",
            ".input_global_scale",
        ),
        ".weight",
    )
    describing: ClassVar[tuple[str, ...]] = (".weight_scale_2", ".weight_global_scale", ".weight_scale")

    def __init__(self, schemes: list[Scheme]) -> None:
        super().__init__(schemes)
        self.has_plain_names = any(scheme["quant_method"] != "compressed-tensors" for scheme in schemes)

    @classmethod
    def reads(cls, scheme: Scheme) -> bool:
        if scheme["quant_method"] == "compressed-tensors":
            group = (scheme.get("type"), scheme.get("num_bits"), scheme.get("group_size"))
            return group == ("float", 4, _BLOCK) and scheme.get("format") == "nvfp4-pack-quantized"
        is_nvfp4 = scheme["quant_method"] == "modelopt" and scheme.get("quant_algo") == "NVFP4"
        return is_nvfp4 and scheme.get("group_size", _BLOCK) == _BLOCK

    def codes_of(self, group: Group) -> str | None:
        packed, scales = group.tensors.get(".weight_packed"), group.tensors.get(".weight_scale")
        if packed is not None:
            # MXFP4 has the same names, with e8m0 scales
            is_other = scales is not None and scales.dtype_name in ("U8", "F8_E8M0")
            return packed.key if packed.dtype_name == "U8" and not is_other else None
        info = group.tensors.get("")
        is_plain = info is not None and self.has_plain_names and group.key.endswith(".weight")
        return group.key if is_plain and info.dtype_name == "U8" else None

    def packed_tensor(self, checkpoint: Checkpoint, group: Group, parts: int = 1) -> Nvfp4Tensor:
        ending = ".weight_packed" if ".weight_packed" in group.tensors else ""
        weight = group.tensors[ending]
        if ending and "" in group.tensors:
            raise CheckpointError(
                f"{weight} and {group.tensors['']} are both the weight {group.key}. Expected one of them. The "
                "checkpoint is a mixture of two; download it again."
            )
        if ".pre_quant_scale" in group.tensors:
            raise CheckpointError(
                f"{group.tensors['.pre_quant_scale']} scales the inputs of {group.key} (AWQ), which is not supported. "
                "Use an NVFP4 checkpoint without pre_quant_scale, or the 16-bit checkpoint."
            )
        if len(weight.shape) != 2 or weight.numel == 0 or 2 * weight.shape[1] % _BLOCK:
            raise CheckpointError(
                f"{weight} is not a matrix of complete blocks of {_BLOCK} columns. Expected U8 (out, in / 2). {_AGAIN}"
            )
        rows, columns = weight.shape[0], 2 * weight.shape[1]
        scales = only_scale(weight, group, (".weight_scale",))
        if scales.dtype_name != "F8_E4M3" or scales.shape != (rows, columns // _BLOCK):
            raise CheckpointError(
                f"{scales} does not match {weight}. Expected F8_E4M3 {[rows, columns // _BLOCK]}, one scale per "
                f"{_BLOCK} columns. {_AGAIN}"
            )
        whole = self._global_scale(weight, group, ending)
        storage = Nvfp4Format(is_inverse=bool(ending))
        return Nvfp4Tensor(group.key, (rows, columns), storage, group.keys, weight, scales, parts, global_scale=whole)

    def _global_scale(self, weight: TensorInfo, group: Group, ending: str) -> TensorInfo:
        expected, *others = sorted(_OF_GLOBAL.values(), key=lambda one: one != _OF_GLOBAL[ending])
        found = group.tensors.get(expected)
        for other in others:
            if other in group.tensors:
                raise CheckpointError(
                    f"{weight} has the second scale {group.tensors[other]}. Expected only "
                    f"{expected.removeprefix('.')}: one of them multiplies, the other divides. The checkpoint is a "
                    "mixture of two; download it again."
                )
        if found is None:
            raise CheckpointError(
                f"{weight} has no second scale. Expected {group.key.removesuffix('.weight')}{expected}, which is "
                "required to decode it. The checkpoint is incomplete; download it again, or use the 16-bit checkpoint."
            )
        if found.dtype_name != "F32" or found.numel != 1:
            raise CheckpointError(f"{found} does not match {weight}. Expected one number in F32. {_AGAIN}")
        return found
