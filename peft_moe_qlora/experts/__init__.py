"""Experts modules with quantized stacks, with or without an adapter."""

from .convert import check_convertible, convert_experts, find_experts, move_hook, revert_experts, stored_format
from .layout import (
    ALWAYS_ON_CLASSES,
    SHARD_LATER,
    UNSUPPORTED_CLASSES,
    ExpertsLayout,
    read_layout,
    refuse_unsupported,
)
from .quantized import QuantizedExperts, bias_name

__all__ = [
    "ALWAYS_ON_CLASSES",
    "SHARD_LATER",
    "UNSUPPORTED_CLASSES",
    "ExpertsLayout",
    "QuantizedExperts",
    "bias_name",
    "check_convertible",
    "convert_experts",
    "find_experts",
    "move_hook",
    "read_layout",
    "refuse_unsupported",
    "revert_experts",
    "stored_format",
]
