"""Storage formats of expert weights."""

from .fidelity import Fidelity
from .format import Format, Spec, parse_format, register_format
from .formats import BY_SIZE, FourBitFormat
from .formats.four_bit import (
    BLOCKSIZES,
    QUANT_TYPES,
    QUANTIZABLE_DTYPES,
    code_values,
    dynamic_map,
    format_of,
    spelled,
)
from .scales import choose_scales
from .stack import DenseStack, QuantizedStack, Stack

__all__ = [
    "BLOCKSIZES",
    "BY_SIZE",
    "QUANTIZABLE_DTYPES",
    "QUANT_TYPES",
    "DenseStack",
    "Fidelity",
    "Format",
    "FourBitFormat",
    "QuantizedStack",
    "Spec",
    "Stack",
    "choose_scales",
    "code_values",
    "dynamic_map",
    "format_of",
    "parse_format",
    "register_format",
    "spelled",
]
