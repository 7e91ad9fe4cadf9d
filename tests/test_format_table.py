"""docs/formats.md is what `python tests/format_table.py` writes."""

from __future__ import annotations

import format_table


def test_the_page_is_up_to_date():
    assert format_table.PAGE.read_text(encoding="utf-8") == format_table.documentation()
