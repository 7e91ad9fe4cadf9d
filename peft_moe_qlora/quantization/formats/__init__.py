"""The formats, one file each; importing them registers them."""

from .four_bit import FourBitFormat
from .fp8 import Fp8Format
from .int8 import Int8Format
from .mxfp4 import Mxfp4Format

__all__ = ["FourBitFormat", "Fp8Format", "Int8Format", "Mxfp4Format"]
