"""4-bit weights as bitsandbytes serializes them: a packed tensor, and beside it what its `QuantState` needs.

`KEY` holds the codes, `(numel / 2, 1)` uint8, or the same bytes as another dtype (`bnb_4bit_quant_storage`);
`KEY.absmax`, `KEY.quant_map` and `KEY.quant_state.bitsandbytes__nf4`
(or `fp4`) the rest, the last as JSON in bytes; `KEY.nested_absmax` and `KEY.nested_quant_map` where the scales are
stored in 8 bits. Format: `bitsandbytes.functional.QuantState.as_dict(packed=True)`, bitsandbytes 0.41 to 0.50.
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
        key: likewise of its codes.
        shape: of the weight.
        storage: how the codes are to be read; the scales are given in fp32, whatever the checkpoint has.
        keys: of all its tensors.
        nested_offset: mean of the scales; None where they are stored in fp32.
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
            raise CheckpointError(f"{self.key} has scales that are not finite; the checkpoint is broken.")
        return {"codes": codes, **self.storage.store_scales(absmax, *self.shape[-2:])}

    def read_each(self, checkpoint: Checkpoint) -> Iterator[dict[str, torch.Tensor]]:
        # all experts are one run of blocks, whose scales are decoded together
        whole = {name: tensor.view(self.shape[0], -1) for name, tensor in self.read(checkpoint).items()}
        return ({name: tensor[expert] for name, tensor in whole.items()} for expert in range(self.shape[0]))


class BitsAndBytesLayout(DiskLayout):
    """bitsandbytes' 4 bits. Each weight describes itself, so that the config needn't."""

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
    """Reads the description of a packed weight, and checks that its parts are complete and consistent.

    Raises:
        CheckpointError: a part is missing, of another shape or dtype, or described in an unknown way.
    """
    info = checkpoint.tensors[key]
    states = [suffix for suffix in STATE_SUFFIXES if key + suffix in checkpoint.tensors]
    if len(states) != 1:
        raise CheckpointError(
            f"{info} has {len(states)} tensors {' or '.join(STATE_SUFFIXES)} beside it; one was expected for a weight "
            "packed by bitsandbytes."
        )
    state = _read_state(checkpoint, key + states[0])
    shape, blocksize, quant_type = tuple(state["shape"]), state["blocksize"], state["quant_type"]
    num_bytes = -(-math.prod(shape) // 2)
    if info.dtype_name not in _STORAGES or info.nbytes != num_bytes:
        raise CheckpointError(
            f"{info} doesn't fit a {quant_type} weight of shape {list(shape)}: U8 with {num_bytes} values was "
            f"expected, or as many bytes in one of {', '.join(_STORAGES[1:])}."
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
            raise CheckpointError(f"{info} lacks {key + suffix}, without which it can't be decoded.")
        if (part.dtype_name, part.numel) != expected:
            raise CheckpointError(
                f"{part} doesn't fit a {quant_type} weight of shape {list(shape)} in blocks of {blocksize}: "
                f"{expected[0]} with {expected[1]} values was expected."
            )
    if not torch.equal(checkpoint.read(f"{key}.quant_map"), code_values(quant_type, torch.device("cpu"))):
        raise CheckpointError(f"{key}.quant_map is not the table of {quant_type}; the codes mean something else.")
    offset = float(state["nested_offset"]) if nested else None
    keys = tuple(key + suffix for suffix in ("", *SUFFIXES) if key + suffix in checkpoint.tensors)
    return BitsAndBytesTensor(key, shape, FourBitFormat(quant_type, blocksize), keys, offset)


def _read_state(checkpoint: Checkpoint, key: str) -> dict[str, Any]:
    info = checkpoint.tensors[key]
    what = f"{info} is no quantization state"
    if info.dtype_name != "U8" or info.numel > 2**16:
        raise CheckpointError(f"{what}: a short text in U8 was expected.")
    state = read_object(bytes(checkpoint.read(key).flatten().tolist()), f"{what}: it")
    expected = _STATE | (_NESTED_STATE if "nested_blocksize" in state else {})
    for name, (values, fits) in expected.items():
        if name not in state or not fits(state[name]):
            found = f"{name}={state[name]!r:.200}" if name in state else f"no {name}"
            raise CheckpointError(f"{what}: it has {found}; {values} was expected.")
    return state


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) in (2, 3) and all(type(size) is int and size > 0 for size in value)


_LARGEST_OFFSET = torch.finfo(torch.float32).max
_STORAGES = ("U8", "I8", "F16", "BF16", "F32", "F64")
_DTYPES = [str(dtype).removeprefix("torch.") for dtype in QUANTIZABLE_DTYPES]
# name -> what it may be, in words, and whether a value is that
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
