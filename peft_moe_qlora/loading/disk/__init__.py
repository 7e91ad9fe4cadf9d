"""The layouts of quantized weights in checkpoints, one file each; each turns its tensors into those of a format."""

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
"""In the order in which they are asked."""


def is_read(declared: dict[str, Any]) -> bool:
    """Whether all weights that a checkpoint's `quantization_config` declares are in layouts that are read."""
    schemes = weight_schemes(declared)
    return bool(schemes) and all(any(layout.reads(scheme) for layout in LAYOUTS) for scheme in schemes)


def layouts_of(declared: dict[str, Any] | None) -> list[DiskLayout]:
    """The layouts in which a checkpoint may have weights.

    Args:
        declared: the `quantization_config` in its config.json; None for none.

    Raises:
        CheckpointError: it has a value that means nothing.
    """
    schemes = [] if declared is None else weight_schemes(declared)
    found = []
    for layout in LAYOUTS:
        own = [scheme for scheme in schemes if layout.reads(scheme)]
        if own or not layout.must_be_declared:
            found.append(layout(own))
    return found


PACKS_ALL_EXPERTS = {"mxfp4": "mxfp4"}
"""`quant_method` that says without a look at the tensors that all experts are packed -> their format."""

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
