"""The package's docstring lists its modules in order: each imports only those above it, and none is missing."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import peft_moe_qlora

PACKAGE = Path(peft_moe_qlora.__file__).parent
LINES = re.findall(r"^    (\w+(?:, \w+)*)(?:  .*)?$", peft_moe_qlora.__doc__, flags=re.MULTILINE)
ORDER = {room: number for number, line in enumerate(LINES) for room in line.split(", ")}


def module_of(module: str) -> str:
    return module.split(".")[1]


def imported(file: Path) -> set[str]:
    """The modules of this package that a file imports, also inside functions and for type checkers."""
    package = [PACKAGE.name, *file.relative_to(PACKAGE).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = package[: len(package) - node.level + 1]
            modules = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {".".join([*above, module]) for module in modules}
    return found


def test_every_module_is_listed():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms - {"__init__", "__main__"} == ORDER.keys()


def test_modules_import_only_those_above_them():
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room in ("__init__", "__main__"):
            continue
        used = {module_of(module) for module in imported(file)} - {room, "__version__"}
        below = {other for other in used if ORDER[other] > ORDER[room]}
        assert not below, f"{file.relative_to(PACKAGE)} uses {below}, which stand below {room}"


def test_no_circular_imports():
    """Neither indirectly nor inside functions."""
    files = {
        ".".join([PACKAGE.name, *file.relative_to(PACKAGE).with_suffix("").parts]): file
        for file in PACKAGE.rglob("*.py")
        if file.name != "__init__.py"
    }
    uses = {name: imported(file) & files.keys() for name, file in files.items()}
    while leaves := [name for name, used in uses.items() if not used]:
        uses = {name: used.difference(leaves) for name, used in uses.items() if name not in leaves}
    assert not uses
