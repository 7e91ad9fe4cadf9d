"""Published FP8 layouts: `quant_method: fp8` and `mxfp8`, and `float-quantized` of compressed-tensors.

`KEY` contains the codes, F8_E4M3 `(out, in)`, or `(E, out, in)` for all experts. `KEY_scale_inv` or `KEY_scale`
contains the scales; if KEY ends in `.weight`, the ending may be replaced by `.scale`. A weight is code times scale:
"inv" refers to the quantizer's factor. The block size is read from the config, because shapes do not determine it: 192
rows have two scales in blocks of 128 and in blocks of 96. Scales of inputs (`activation_scale`, `input_scale`) are
ignored.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch

from ...quantization.formats import Fp8Format
from ..checkpoint import Checkpoint, CheckpointError, TensorInfo
from .base import DiskLayout, Group, Scheme
from .for_engines import EngineLayout, Stored, register_engine_layout
from .grid import GridTensor, check_matrix, only_scale, scale_kind

TENSOR, CHANNEL, MX = (0, 0), (1, 0), (1, 32)


class Fp8Layout(DiskLayout):
    """e4m3 with scales per block of a declared size, per channel or per tensor; recognized by the dtype of a weight.

    Args:
        schemes: as in `DiskLayout`.

    Raises:
        CheckpointError: a scheme has an invalid block size.
    """

    endings: ClassVar[dict[str, str]] = {
        ".activation_scale": ".weight",
        "_activation_scale": "",
        ".input_scale": ".weight",
        "_input_scale": "",
        "_scale_inv": "",
        ".scale": ".weight",
        "_scale": "",
    }
    describing: ClassVar[tuple[str, ...]] = ("_scale_inv", ".scale", "_scale")

    def __init__(self, schemes: list[Scheme]) -> None:
        super().__init__(schemes)
        self.blocks = list(dict.fromkeys(_block(scheme) for scheme in schemes))
        self.is_declared = all(scheme.get("weight_block_size", ...) is not ... for scheme in schemes)

    @classmethod
    def reads(cls, scheme: Scheme) -> bool:
        if scheme["quant_method"] == "compressed-tensors":
            is_fp8 = (scheme.get("type"), scheme.get("num_bits")) == ("float", 8)
            return is_fp8 and scheme.get("format") == "float-quantized" and scheme.get("strategy") in _OF_STRATEGY
        return scheme["quant_method"] in ("fp8", "mxfp8")

    def codes_of(self, group: Group) -> str | None:
        info = group.tensors.get("")
        return group.key if info is not None and info.dtype_name.startswith("F8_") else None

    def packed_tensor(self, checkpoint: Checkpoint, group: Group, parts: int = 1) -> GridTensor:
        weight = group.tensors[""]
        if weight.dtype_name != "F8_E4M3":
            raise CheckpointError(
                f"{weight} is in {_NAMES.get(weight.dtype_name, 'a dtype that is not supported')}. Expected F8_E4M3. "
                "Use a checkpoint in e4m3 (float8_e4m3fn), or the 16-bit checkpoint."
            )
        check_matrix(weight)
        scales = only_scale(weight, group, self.describing)
        kind = scale_kind(weight, scales)
        expected: list[tuple[int, ...]] = []
        for block in self.blocks:
            storage = Fp8Format(block, kind)
            shapes = _shapes_of_scales(weight, storage, parts)
            if scales.shape in shapes:
                return GridTensor(group.key, weight.shape, storage, group.keys, weight, scales, parts)
            expected += shapes
        raise self._misfit(weight, scales, expected)

    def _misfit(self, weight: TensorInfo, scales: TensorInfo, expected: list[tuple[int, ...]]) -> CheckpointError:
        if self.blocks == [TENSOR] and not self.is_declared and len(scales.shape) > 1:
            return CheckpointError(
                f"{scales} contains one scale per block of {weight.key}, but quantization_config in config.json has "
                "no weight_block_size. Expected the size of the blocks, such as [128, 128]. Add it to config.json as "
                "given in the model card."
            )
        blocks = " or ".join(str(list(block)) if all(block) else _NAMES_OF_BLOCKS[block] for block in self.blocks)
        return CheckpointError(
            f"{scales} does not match {weight}. Expected {' or '.join(str(list(shape)) for shape in expected)} for "
            f"the blocks declared in quantization_config ({blocks}). Download the checkpoint again, or correct "
            "config.json."
        )


@register_engine_layout
class Fp8ForEngines(EngineLayout):
    """The layout of DeepSeek-V3: blocks of 128 x 128 with fp32 scales, one tensor per expert and projection.

    vLLM 0.33 and SGLang 0.5.23 read experts in this layout, and all linear layers that are not listed in
    `modules_to_not_convert`. They reject experts whose width is not a multiple of the block size, quantize inputs in
    blocks of 128 columns, and concatenate the layers of a group along the rows; only the last of a group may end in an
    incomplete block.
    """

    name: ClassVar[str] = "fp8"
    storage: ClassVar[Fp8Format] = Fp8Format()
    linear: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("q_proj", "k_proj", "v_proj"),
        ("o_proj",),
        ("q_a_proj", "kv_a_proj_with_mqa"),
        ("q_b_proj",),
        ("kv_b_proj",),
        ("gate_proj", "up_proj"),
        ("down_proj",),
        ("w1", "w3"),
        ("w2",),
    )

    def stored(self, key: str, rows: int, columns: int) -> dict[str, tuple[str, Stored]]:
        return {
            "codes": (key, Stored((rows, columns), torch.float8_e4m3fn)),
            "block_scales": (f"{key}_scale_inv", Stored(self.storage.grid(rows, columns), torch.float32)),
        }

    def keys_of_stack(self, class_name: str, key: str, parts: int) -> list[str] | None:
        path, _, name = key.rpartition(".")
        if class_name not in _FUSED_IN_16_BITS:
            return None
        if name == "gate_up_proj" and parts == 2:
            return [f"{path}.{{}}.gate_proj.weight", f"{path}.{{}}.up_proj.weight"]
        return [f"{path}.{{}}.down_proj.weight"] if name == "down_proj" else None

    def why_not(self, rows: int, columns: int) -> str | None:
        misfits = [size for size, of_block in zip((rows, columns), self.storage.block) if size % of_block]
        return f"{misfits[0]} is not a multiple of {self.storage.block[0]}" if misfits else None

    def takes_linear(self, name: str, rows: int, columns: int) -> bool:
        if name == "kv_a_proj_with_mqa":  # the last of its group, which may end in an incomplete block
            rows = self.storage.block[0]
        return super().takes_linear(name, rows, columns)

    def config(self, kept: Iterable[str]) -> dict[str, Any]:
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(self.storage.block),
            "modules_to_not_convert": list(kept),
        }


_FUSED_IN_16_BITS = frozenset({"Qwen3_5MoeExperts", "Qwen3VLMoeTextExperts"})
"""Classes whose published checkpoints have fused experts in 16 bits, but one tensor per expert in FP8."""


def _shapes_of_scales(weight: TensorInfo, storage: Fp8Format, parts: int) -> list[tuple[int, ...]]:
    *leading, rows, columns = weight.shape
    if storage.block == TENSOR:
        if not leading:
            return [(), (1,)]
        return [(*leading, 1, 1), *([(*leading, parts, 1)] if parts > 1 else [])]
    return [(*leading, *storage.grid(rows, columns, parts))]


def _block(scheme: Scheme) -> tuple[int, int]:
    """Rows and columns that share a scale, 0 for all.

    Raises:
        CheckpointError: the sizes are invalid, or another type of codes is declared.
    """
    if scheme["quant_method"] == "compressed-tensors":
        block = _OF_STRATEGY[scheme["strategy"]]
        return _sizes("block_structure", scheme.get("block_structure")) if block is None else block
    if str(scheme.get("fmt") or "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise CheckpointError(
            f"quantization_config has fmt={scheme['fmt']!r:.200}. Expected 'e4m3'. Use a checkpoint in e4m3, or the "
            "16-bit checkpoint."
        )
    default = list(MX) if scheme["quant_method"] == "mxfp8" else None
    found = scheme.get("weight_block_size", default)
    return TENSOR if found is None else _sizes("weight_block_size", found)


def _sizes(name: str, found: Any) -> tuple[int, int]:
    is_pair = isinstance(found, (list, tuple)) and len(found) == 2
    if not is_pair or not all(type(size) is int and 0 < size <= _LARGEST_BLOCK for size in found):
        raise CheckpointError(
            f"quantization_config has {name}={found!r:.200}. Expected rows and columns of a block, such as [128, "
            "128]. Correct config.json as given in the model card."
        )
    return tuple(found)


_LARGEST_BLOCK = 2**20
_OF_STRATEGY = {"channel": CHANNEL, "tensor": TENSOR, "block": None}
_NAMES_OF_BLOCKS = {CHANNEL: "one scale per row", TENSOR: "one scale per matrix"}
_NAMES = {
    "F8_E5M2": "e5m2, a format for gradients",
    "F8_E4M3FNUZ": "e4m3fnuz (ROCm), whose codes have half the value",
    "F8_E5M2FNUZ": "e5m2fnuz (ROCm)",
    "F8_E8M0": "e8m0, a format for scales",
}
