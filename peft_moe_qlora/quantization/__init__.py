"""How a stack of expert weights is stored."""

from .fidelity import Fidelity
from .four_bit import BLOCKSIZES, QUANT_TYPES, QUANTIZABLE_DTYPES, FourBitFormat, code_values, dynamic_map
from .stack import DenseStack, QuantizedStack, Stack

__all__ = [
    "BLOCKSIZES",
    "QUANTIZABLE_DTYPES",
    "QUANT_TYPES",
    "DenseStack",
    "Fidelity",
    "FourBitFormat",
    "QuantizedStack",
    "Stack",
    "code_values",
    "dynamic_map",
]
