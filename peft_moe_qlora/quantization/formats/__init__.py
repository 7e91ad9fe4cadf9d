"""The storage formats, one file each; importing them registers them."""

from .four_bit import FourBitFormat
from .fp8 import Fp8Format
from .int4 import Int4Format
from .int8 import Int8Format
from .mxfp4 import Mxfp4Format
from .nvfp4 import Nvfp4Format

BY_SIZE = ("fp8/128x128", "nf4/64", "nf4/64+dq")
"""Storage formats for 16-bit weights, by decreasing size; see `parse_format`."""

__all__ = ["BY_SIZE", "FourBitFormat", "Fp8Format", "Int4Format", "Int8Format", "Mxfp4Format", "Nvfp4Format"]
