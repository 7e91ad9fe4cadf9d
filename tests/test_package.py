"""The distribution: data files are declared, and versions agree."""

from __future__ import annotations

import re
import runpy
from fnmatch import fnmatch
from importlib.metadata import distributions
from pathlib import Path

import pytest

import peft_moe_qlora

PACKAGE = Path(peft_moe_qlora.__file__).parent
ROOT = Path(__file__).parent.parent
SOURCE = "https://github.com/peft-moe-qlora/peft-moe-qlora"
SITE = "https://peft-moe-qlora.github.io/peft-moe-qlora"
LINK = re.compile(r"\]\(([^)]+)\)")


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


def test_citation_has_the_version():
    assert f"version: {peft_moe_qlora.__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()


def test_links_on_pypi_are_absolute():
    """README.md has relative links, which PyPI would not resolve."""
    text = runpy.run_path(str(ROOT / "setup.py"))["description"]()
    links, own = LINK.findall(text), LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    place_of = dict(zip(own, links, strict=True))
    assert [link for link in links if not link.startswith("https://")] == []
    assert place_of["docs/index.md"] == f"{SITE}/"
    assert place_of["docs/getting-started.md"] == f"{SITE}/getting-started/"
    assert place_of["CONTRIBUTING.md"] == f"{SOURCE}/blob/main/CONTRIBUTING.md"
    assert place_of["docs/quickstart.png"].endswith(".com/peft-moe-qlora/peft-moe-qlora/main/docs/quickstart.png")
    assert LINK.sub("", text) == LINK.sub("", (ROOT / "README.md").read_text(encoding="utf-8"))


def test_wheel_has_that_description():
    """If the package is an installed wheel, as in .ci/run."""
    if PACKAGE.parent == ROOT:
        pytest.skip("the package is not an installed wheel")
    (wheel,) = distributions(name="peft-moe-qlora", path=[str(PACKAGE.parent)])
    written = wheel.metadata.get_payload() or wheel.metadata["Description"]
    assert written.strip() == runpy.run_path(str(ROOT / "setup.py"))["description"]().strip()
    assert wheel.metadata["Description-Content-Type"] == "text/markdown"
