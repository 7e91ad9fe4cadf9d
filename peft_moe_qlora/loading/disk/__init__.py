"""The layouts of quantized weights in checkpoints, one file each, and their conversion to storage formats."""

from __future__ import annotations

from typing import Any

from .base import DiskLayout, PackedTensor, quant_method, weight_schemes
from .bitsandbytes import BitsAndBytesLayout
from .fp8 import Fp8Layout
from .index import PackedIndex
from .integers import Int8Layout, PackedIntegersLayout
from .mxfp4 import Mxfp4Layout
from .nvfp4 import Nvfp4Layout

LAYOUTS: list[type[DiskLayout]] = [
    BitsAndBytesLayout,
    Fp8Layout,
    Int8Layout,
    PackedIntegersLayout,
    Nvfp4Layout,
    Mxfp4Layout,
]
"""All layouts; the first that matches a weight is used."""


def is_read(declared: dict[str, Any]) -> bool:
    """Whether the layouts of all weights declared in a checkpoint's `quantization_config` are supported."""
    schemes = weight_schemes(declared)
    return bool(schemes) and all(any(layout.reads(scheme) for layout in LAYOUTS) for scheme in schemes)


def layouts_of(declared: dict[str, Any] | None) -> list[DiskLayout]:
    """The layouts that weights of a checkpoint may have.

    Args:
        declared: the `quantization_config` in its config.json; None for an unquantized checkpoint.

    Raises:
        CheckpointError: `declared` has an invalid value.
    """
    schemes = [] if declared is None else weight_schemes(declared)
    found = []
    for layout in LAYOUTS:
        own = [scheme for scheme in schemes if layout.reads(scheme)]
        if own or not layout.must_be_declared:
            found.append(layout(own))
    return found


PACKS_ALL_EXPERTS = {"mxfp4": "mxfp4"}
"""`quant_method` for which all experts are always packed -> their storage format."""

__all__ = [
    "LAYOUTS",
    "PACKS_ALL_EXPERTS",
    "BitsAndBytesLayout",
    "DiskLayout",
    "PackedIndex",
    "PackedTensor",
    "is_read",
    "layouts_of",
    "quant_method",
    "weight_schemes",
]
