"""How a stack of expert weights is stored."""

from .fidelity import Fidelity
from .four_bit import BLOCKSIZES, QUANT_TYPES, QUANTIZABLE_DTYPES, FourBitFormat, code_values, dynamic_map
from .second_order import MergedExpert, quantize_second_order
from .stack import DenseStack, QuantizedStack, Stack

__all__ = [
    "BLOCKSIZES",
    "QUANTIZABLE_DTYPES",
    "QUANT_TYPES",
    "DenseStack",
    "Fidelity",
    "FourBitFormat",
    "MergedExpert",
    "QuantizedStack",
    "Stack",
    "code_values",
    "dynamic_map",
    "quantize_second_order",
]
