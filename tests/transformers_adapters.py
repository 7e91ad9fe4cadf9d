"""Whether transformers' own adapter methods work with the installed PEFT."""

from __future__ import annotations

import pytest
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import check_peft_version


def _why_not() -> str | None:
    """The error of `add_adapter`, `set_adapter` and similar methods; `load_adapter` works with PEFT of any version."""
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError as error:
        return str(error)
    return None


needs_adapter_methods = pytest.mark.skipif(_why_not() is not None, reason=f"transformers: {_why_not()}")
