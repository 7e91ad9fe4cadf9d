"""The formats, one file each; importing them registers them."""

from .four_bit import FourBitFormat
from .fp8 import Fp8Format
from .int4 import Int4Format
from .int8 import Int8Format
from .mxfp4 import Mxfp4Format
from .nvfp4 import Nvfp4Format

__all__ = ["FourBitFormat", "Fp8Format", "Int4Format", "Int8Format", "Mxfp4Format", "Nvfp4Format"]
