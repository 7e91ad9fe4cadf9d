"""Imports bitsandbytes before PEFT does, and suppresses a notice that does not concern this package.

On a CPU with AVX512-BF16, bitsandbytes recommends the package `kernels` for a kernel that 4-bit layers don't use here,
because it repacks their weights permanently. If bitsandbytes or PEFT is imported before this package, the notice has
already been printed.
"""

from __future__ import annotations

import logging

_LOGGER = logging.getLogger("bitsandbytes.backends.cpu.ops")
_NOTICE = "Failed to load CPU gemm_4bit_forward"


def is_of_interest(record: logging.LogRecord) -> bool:
    """Whether a log record of bitsandbytes is not the notice."""
    return not record.getMessage().startswith(_NOTICE)


_LOGGER.addFilter(is_of_interest)
try:
    import bitsandbytes  # noqa: F401
finally:
    _LOGGER.removeFilter(is_of_interest)
