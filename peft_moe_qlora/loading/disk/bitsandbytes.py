"""4-bit weights as serialized by bitsandbytes: a packed tensor, and the tensors of its `QuantState`.

`KEY` contains the codes, `(numel / 2, 1)` uint8, or the same bytes as another dtype (`bnb_4bit_quant_storage`).
`KEY.absmax` contains the scales, `KEY.quant_map` the table of values, and `KEY.quant_state.bitsandbytes__nf4`
(or `fp4`) metadata as JSON in bytes. `KEY.nested_absmax` and `KEY.nested_quant_map` exist if the scales are stored in
8 bits. Format: `bitsandbytes.functional.QuantState.as_dict(packed=True)`, bitsandbytes 0.41 to 0.50.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from bitsandbytes import functional as bnb

from ...quantization import BLOCKSIZES, QUANT_TYPES, QUANTIZABLE_DTYPES, FourBitFormat, code_values
from ..checkpoint import Checkpoint, CheckpointError, read_object
from .base import DiskLayout, Group, PackedTensor, Scheme

STATE_SUFFIXES = tuple(f".quant_state.bitsandbytes__{quant_type}" for quant_type in QUANT_TYPES)
SUFFIXES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", *STATE_SUFFIXES)


def is_in_4_bits(scheme: Scheme) -> bool:
    return bool(scheme.get("load_in_4bit", scheme.get("_load_in_4bit", False)))


@dataclass(frozen=True)
class BitsAndBytesTensor(PackedTensor):
    """A weight packed in 4 bits.

    Args:
        key: key of the weight and of its codes.
        shape: shape of the weight.
        storage: storage format; always with fp32 scales, to which 8-bit scales of the checkpoint are decoded.
        keys: keys of all its tensors.
        nested_offset: mean of the scales; None if they are stored in fp32.
    """

    nested_offset: float | None

    is_out_in: ClassVar[bool] = False
    can_be_requantized: ClassVar[bool] = False

    @property
    def description(self) -> str:
        return f"bitsandbytes {self.storage}"

    def read(self, checkpoint: Checkpoint, expert: int | None = None) -> dict[str, torch.Tensor]:
        """Codes unchanged, and fp32 scales as bitsandbytes itself computes them at run time.

        Raises:
            CheckpointError: a scale is not finite.
        """
        if expert is not None:
            return list(self.read_each(checkpoint))[expert]
        codes = checkpoint.read(self.key).flatten().view(torch.uint8)
        absmax = checkpoint.read(f"{self.key}.absmax").flatten()
        if self.nested_offset is not None:
            nested = bnb.QuantState(
                absmax=checkpoint.read(f"{self.key}.nested_absmax").flatten(),
                code=checkpoint.read(f"{self.key}.nested_quant_map").flatten(),
                blocksize=256,
                dtype=torch.float32,
            )
            absmax = bnb.dequantize_blockwise(absmax, nested) + self.nested_offset
        if not torch.isfinite(absmax).all():
            raise CheckpointError(
                f"{self.key} has scales that are NaN or infinite. Expected finite scales. The checkpoint is damaged; "
                "download it again, or use the 16-bit checkpoint."
            )
        return {"codes": codes, **self.storage.store_scales(absmax, *self.shape[-2:])}

    def read_each(self, checkpoint: Checkpoint) -> Iterator[dict[str, torch.Tensor]]:
        # blocks run on from expert to expert, so all scales are decoded together
        whole = {name: tensor.view(self.shape[0], -1) for name, tensor in self.read(checkpoint).items()}
        return ({name: tensor[expert] for name, tensor in whole.items()} for expert in range(self.shape[0]))


class BitsAndBytesLayout(DiskLayout):
    """4-bit weights of bitsandbytes. Each weight has its own metadata, so the config need not declare them."""

    must_be_declared: ClassVar[bool] = False
    endings: ClassVar[dict[str, str]] = dict.fromkeys(SUFFIXES, "")
    describing: ClassVar[tuple[str, ...]] = SUFFIXES

    @classmethod
    def reads(cls, scheme: Scheme) -> bool:
        return scheme["quant_method"] == "bitsandbytes" and is_in_4_bits(scheme)

    def codes_of(self, group: Group) -> str | None:
        return group.key if "" in group.tensors and len(group.tensors) > 1 else None

    def packed_tensor(self, checkpoint: Checkpoint, group: Group, parts: int = 1) -> BitsAndBytesTensor:
        return packed_tensor(checkpoint, group.key)


def packed_tensor(checkpoint: Checkpoint, key: str) -> BitsAndBytesTensor:
    """Reads the metadata of a packed weight, and checks that its tensors are complete and consistent.

    Raises:
        CheckpointError: a tensor is missing, has another shape or dtype, or metadata that is not supported.
    """
    info = checkpoint.tensors[key]
    states = [suffix for suffix in STATE_SUFFIXES if key + suffix in checkpoint.tensors]
    if len(states) != 1:
        raise CheckpointError(
            f"{info} has {len(states)} tensors {' or '.join(STATE_SUFFIXES)}. Expected one for a weight packed by "
            "bitsandbytes. Download the checkpoint again."
        )
    state = _read_state(checkpoint, key + states[0])
    shape, blocksize, quant_type = tuple(state["shape"]), state["blocksize"], state["quant_type"]
    num_bytes = -(-math.prod(shape) // 2)
    if info.dtype_name not in _STORAGES or info.nbytes != num_bytes:
        raise CheckpointError(
            f"{info} does not match a {quant_type} weight of shape {list(shape)}. Expected U8 with {num_bytes} "
            f"values, or the same number of bytes in one of {', '.join(_STORAGES[1:])}. Download the checkpoint again."
        )
    num_blocks = -(-math.prod(shape) // blocksize)
    nested = "nested_blocksize" in state
    parts = {
        ".absmax": ("U8" if nested else "F32", num_blocks),
        ".quant_map": ("F32", 16),
    }
    if nested:
        parts |= {".nested_absmax": ("F32", -(-num_blocks // 256)), ".nested_quant_map": ("F32", 256)}
    for suffix, expected in parts.items():
        part = checkpoint.tensors.get(key + suffix)
        if part is None:
            raise CheckpointError(
                f"{info} lacks {key + suffix}, which is required to decode it. The checkpoint is incomplete; download "
                "it again."
            )
        if (part.dtype_name, part.numel) != expected:
            raise CheckpointError(
                f"{part} does not match a {quant_type} weight of shape {list(shape)} in blocks of {blocksize}. "
                f"Expected {expected[0]} with {expected[1]} values. Download the checkpoint again."
            )
    if not torch.equal(checkpoint.read(f"{key}.quant_map"), code_values(quant_type, torch.device("cpu"))):
        raise CheckpointError(
            f"{key}.quant_map is not the table of {quant_type}, so the codes have other values. Use the 16-bit "
            "checkpoint."
        )
    offset = float(state["nested_offset"]) if nested else None
    keys = tuple(key + suffix for suffix in ("", *SUFFIXES) if key + suffix in checkpoint.tensors)
    return BitsAndBytesTensor(key, shape, FourBitFormat(quant_type, blocksize), keys, offset)


def _read_state(checkpoint: Checkpoint, key: str) -> dict[str, Any]:
    info = checkpoint.tensors[key]
    what = f"{info} is not a quantization state"
    if info.dtype_name != "U8" or info.numel > 2**16:
        raise CheckpointError(f"{what}. Expected at most {2**16} bytes in U8. Download the checkpoint again.")
    state = read_object(bytes(checkpoint.read(key).flatten().tolist()), f"{what}: its text")
    expected = _STATE | (_NESTED_STATE if "nested_blocksize" in state else {})
    for name, (values, fits) in expected.items():
        if name not in state or not fits(state[name]):
            found = f"{name}={state[name]!r:.200}" if name in state else f"no {name}"
            raise CheckpointError(f"{what}: it has {found}. Expected {values}. Use the 16-bit checkpoint.")
    return state


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) in (2, 3) and all(type(size) is int and size > 0 for size in value)


_LARGEST_OFFSET = torch.finfo(torch.float32).max
_STORAGES = ("U8", "I8", "F16", "BF16", "F32", "F64")
_DTYPES = [str(dtype).removeprefix("torch.") for dtype in QUANTIZABLE_DTYPES]
# name -> description of the allowed values, and a function that checks a value
_STATE: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "shape": ("a list of two or three sizes", _are_sizes),
    "dtype": (f"one of {', '.join(_DTYPES)}", _DTYPES.__contains__),
    "quant_type": (f"one of {', '.join(QUANT_TYPES)}", QUANT_TYPES.__contains__),
    "blocksize": (f"one of {BLOCKSIZES}", lambda value: type(value) is int and value in BLOCKSIZES),
}
_NESTED_STATE: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "nested_blocksize": ("256", lambda value: type(value) is int and value == 256),
    "nested_dtype": ("float32", lambda value: value == "float32"),
    "nested_offset": ("a finite number", lambda value: type(value) in (int, float) and abs(value) < _LARGEST_OFFSET),
}
