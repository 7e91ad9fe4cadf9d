"""What an experts module is, with or without an adapter."""

from .convert import check_convertible, convert_experts, find_experts, revert_experts
from .layout import ExpertsLayout
from .quantized import QuantizedExperts, bias_name

__all__ = [
    "ExpertsLayout",
    "QuantizedExperts",
    "bias_name",
    "check_convertible",
    "convert_experts",
    "find_experts",
    "revert_experts",
]
