"""The documentation pages build without warnings, and their links, quotes and calls are valid."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import peft_moe_qlora
from peft_moe_qlora import cli

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
PUBLIC = ("peft_moe_qlora", "peft_moe_qlora.training", "peft_moe_qlora.merge", "peft_moe_qlora.layouts")
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def ids(pages: list[Path]) -> list[str]:
    return [page.relative_to(ROOT).as_posix() for page in pages]


def blocks(page: Path, language: str) -> list[str]:
    return [text for name, text in FENCE.findall(page.read_text(encoding="utf-8")) if name == language]


def anchors(page: Path) -> set[str]:
    """Anchors of headings, as GitHub and MkDocs generate them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_site_builds_strictly(tmp_path):
    pytest.importorskip("mkdocstrings", reason='mkdocstrings is not installed: pip install -e ".[docs]"')
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    api = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    listed = [(module, name) for module in PUBLIC for name in importlib.import_module(module).__all__]
    # a function may have the name of its module
    missing = [
        f"{module}.{name}"
        for module, name in listed
        if not any(f'id="{module}.{path}"' in api for path in (name, f"{name}.{name}"))
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_links_within_the_repository(page):
    text = re.sub(r"`[^`\n]*`(?!\])", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if ":" in path:
            continue
        file = page.parent / path if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


COMMANDS = [
    (page, line)
    for page in PAGES
    for text in blocks(page, "bash")
    for line in text.replace("\\\n", " ").splitlines()
    if line.startswith("peft-moe-qlora ")
]


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page.stem}: {line[:60]}" for page, line in COMMANDS])
def test_documented_command_options_exist(page, line):
    """Commands are parsed, not run."""
    words = shlex.split(line, comments=True)
    assert vars(cli._parser().parse_args(words[1:]))["command"] == words[1]


PYTHON = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize("page", PYTHON, ids=ids(PYTHON))
def test_documented_imports_exist(page):
    """test_readme.py runs code that only needs a model. `, ...)` means further arguments."""
    for text in blocks(page, "python"):
        for node in ast.walk(ast.parse(re.sub(r",\s*\.\.\.\s*([,)])", r"\1", text))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peft_moe_qlora"):
                try:
                    module = importlib.import_module(node.module)
                except ModuleNotFoundError as error:
                    if (error.name or "").startswith("peft_moe_qlora"):
                        raise
                    pytest.skip(f"{node.module} needs {error.name}, which is not installed")
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def messages() -> list[str]:
    """All string literals of the package, with `…` in place of formatted values."""
    found = []
    for file in Path(peft_moe_qlora.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (one.value if isinstance(one, ast.Constant) else "…" for one in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value.replace("%s", "…"))
    return found


# raised by PEFT, in a process without this package
OF_PEFT = ("KeyError: 'MOE_QLORA'",)


def test_explained_messages_exist_in_the_package():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [
        quote for line in re.findall(r"^### (.+)$", text, re.MULTILINE) for quote in re.findall("`([^`]+)`", line)
    ]
    assert len(quoted) > 40
    known = "\n".join(messages()).replace("`", "…")
    stale = [
        quote
        for quote in quoted
        if quote not in OF_PEFT and not re.search(re.escape(quote).replace("…", "[^\n]*"), known)
    ]
    assert stale == []
