"""How a model comes to hold quantized experts."""

from .in_memory import restore_experts, store_experts

__all__ = ["restore_experts", "store_experts"]
