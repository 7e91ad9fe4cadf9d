"""Values computed once per device that `torch.compile` treats as constants."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def cached_constant(function: Callable[..., T]) -> Callable[..., T]:
    """Caches results by arguments and makes them constants for `torch.compile`, which warns about traced caches."""
    cached = cache(function)

    @torch.compiler.assume_constant_result
    @wraps(function)
    def look_up(*args: Any) -> T:
        return cached(*args)

    look_up.cache_clear = cached.cache_clear
    return look_up
