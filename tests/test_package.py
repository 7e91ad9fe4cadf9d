"""The distribution: what the package needs beside its modules is declared, and versions agree."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest

import peft_moe_qlora

PACKAGE = Path(peft_moe_qlora.__file__).parent
ROOT = Path(__file__).parent.parent


def test_every_data_file_is_in_the_wheel():
    tomllib = pytest.importorskip("tomllib", reason="it comes with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"][PACKAGE.name]
    names = [
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc")
    ]
    assert "layouts/engines.csv" in names
    assert [name for name in names if not any(fnmatch(name, pattern) for pattern in patterns)] == []


def test_the_citation_has_the_version():
    assert f"version: {peft_moe_qlora.__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
