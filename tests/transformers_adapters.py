"""Whether transformers' own adapter methods can be called with the installed PEFT."""

from __future__ import annotations

import pytest
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import check_peft_version


def _why_not() -> str | None:
    """What `add_adapter`, `set_adapter` and the like would say; `load_adapter` takes PEFT of any version."""
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError as error:
        return str(error)
    return None


needs_adapter_methods = pytest.mark.skipif(_why_not() is not None, reason=f"transformers: {_why_not()}")
