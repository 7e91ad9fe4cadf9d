"""4-bit weights as bitsandbytes serializes them: a packed tensor, and beside it what its `QuantState` needs.

`KEY` holds the codes, `(numel / 2, 1)` uint8; `KEY.absmax`, `KEY.quant_map` and `KEY.quant_state.bitsandbytes__nf4`
(or `fp4`) the rest, the last as JSON in bytes; `KEY.nested_absmax` and `KEY.nested_quant_map` where the scales are
stored in 8 bits. Format: `bitsandbytes.functional.QuantState.as_dict(packed=True)`, bitsandbytes 0.41 to 0.50.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import torch
from bitsandbytes import functional as bnb

from ..quantization import BLOCKSIZES, QUANT_TYPES, FourBitFormat, code_values
from .checkpoint import Checkpoint, CheckpointError

STATE_SUFFIXES = tuple(f".quant_state.bitsandbytes__{quant_type}" for quant_type in QUANT_TYPES)
SUFFIXES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", *STATE_SUFFIXES)


def split_suffix(key: str) -> tuple[str, str]:
    """`(key of the codes, suffix)`; the suffix is empty for the codes and for any other tensor."""
    for suffix in SUFFIXES:
        if key.endswith(suffix):
            return key.removesuffix(suffix), suffix
    return key, ""


@dataclass(frozen=True)
class PackedTensor:
    """One packed weight of a checkpoint, its header checked.

    Args:
        key: of its codes.
        shape: of the weight.
        dtype: of the weight before it was quantized.
        storage: how the codes are to be read; the scales are given in fp32, whatever the checkpoint has.
        nested_offset: mean of the scales; None where they are stored in fp32.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: FourBitFormat
    nested_offset: float | None

    def read(self, checkpoint: Checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
        """`(numel / 2,)` codes and `(num_blocks,)` fp32 scales, as bitsandbytes itself computes them at use."""
        codes = checkpoint.read(self.key).flatten()
        absmax = checkpoint.read(f"{self.key}.absmax")
        if self.nested_offset is None:
            return codes, absmax
        nested = bnb.QuantState(
            absmax=checkpoint.read(f"{self.key}.nested_absmax"),
            code=checkpoint.read(f"{self.key}.nested_quant_map"),
            blocksize=256,
            dtype=torch.float32,
        )
        return codes, bnb.dequantize_blockwise(absmax, nested) + self.nested_offset


def packed_tensor(checkpoint: Checkpoint, key: str) -> PackedTensor:
    """Reads the description of a packed weight, and makes sure that all its parts are there and fit each other.

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
    try:
        shape, blocksize, quant_type = tuple(state["shape"]), state["blocksize"], state["quant_type"]
        dtype = getattr(torch, state["dtype"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{key + states[0]} doesn't describe a quantized weight: {error!r}.") from error
    if quant_type not in QUANT_TYPES or blocksize not in BLOCKSIZES:
        raise CheckpointError(f"{key} is stored as {quant_type} in blocks of {blocksize}, which is not supported.")
    num_blocks = -(-math.prod(shape) // blocksize)
    nested = "nested_blocksize" in state
    parts = {
        "": ("U8", -(-math.prod(shape) // 2)),
        ".absmax": ("U8" if nested else "F32", num_blocks),
        ".quant_map": ("F32", 16),
    }
    if nested:
        if state["nested_blocksize"] != 256 or state.get("nested_dtype") != "float32":
            raise CheckpointError(
                f"{key}: scales in groups of {state['nested_blocksize']} and {state.get('nested_dtype')} are unknown; "
                "groups of 256 and float32 were expected."
            )
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
    return PackedTensor(key, shape, dtype, FourBitFormat(quant_type, blocksize), offset)


def _read_state(checkpoint: Checkpoint, key: str) -> dict:
    info = checkpoint.tensors[key]
    if info.dtype_name != "U8" or info.numel > 2**16:
        raise CheckpointError(f"{info} is no quantization state: a short text in U8 was expected.")
    try:
        state = json.loads(bytes(checkpoint.read(key).tolist()))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{info} is no quantization state: {error}.") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{info} is no quantization state: {type(state).__name__} instead of a dictionary.")
    return state
