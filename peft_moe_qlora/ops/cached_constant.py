"""What is settled once for a device, in a way that `torch.compile` takes for a constant."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def cached_constant(function: Callable[..., T]) -> Callable[..., T]:
    """Computed once for the same arguments, and a constant to `torch.compile`, which warns of caches that it sees."""
    cached = cache(function)

    @torch.compiler.assume_constant_result
    @wraps(function)
    def look_up(*args: Any) -> T:
        return cached(*args)

    look_up.cache_clear = cached.cache_clear
    return look_up
