"""Imports bitsandbytes, before PEFT does, without a notice that says nothing of this package.

On a CPU with AVX512-BF16 it asks for the package `kernels`, for a kernel that 4-bit layers don't use here: it repacks
their weights for good. A process that has imported bitsandbytes or PEFT before has had the notice already.
"""

from __future__ import annotations

import logging

_LOGGER = logging.getLogger("bitsandbytes.backends.cpu.ops")
_NOTICE = "Failed to load CPU gemm_4bit_forward"


def is_of_interest(record: logging.LogRecord) -> bool:
    """Whether a record of bitsandbytes is anything but the notice."""
    return not record.getMessage().startswith(_NOTICE)


_LOGGER.addFilter(is_of_interest)
try:
    import bitsandbytes  # noqa: F401
finally:
    _LOGGER.removeFilter(is_of_interest)
