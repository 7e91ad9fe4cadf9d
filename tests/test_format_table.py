"""docs/formats.md is the output of `python tests/format_table.py`."""

from __future__ import annotations

import format_table


def test_page_is_up_to_date():
    assert format_table.PAGE.read_text(encoding="utf-8") == format_table.documentation()
