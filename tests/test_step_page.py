"""The tables of measured steps in the documentation match the results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = """
import sys
from pathlib import Path
from step_page import TABLES, with_tables
for page, tables in TABLES.items():
    text = Path("..", page).read_text(encoding="utf-8")
    if with_tables(text, tables) != text:
        sys.exit(f"{page} is stale: python benchmarks/step_page.py writes its tables.")
try:
    with_tables("<!-- other:begin --><!-- other:end -->", {"times": str})
except ValueError as error:
    assert "does not contain the table times" in str(error)
else:
    sys.exit("a page without a table's marks was written")
"""


@pytest.mark.timeout(120)
def test_tables_are_up_to_date():
    run = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT / "benchmarks", capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
