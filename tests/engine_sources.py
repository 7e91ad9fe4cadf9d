"""Single files of an engine's wheel as modules, and stubs for everything else that they import.

No package of the engine is imported: neither its `__init__` nor a compiled part runs. Its dependencies need not be
installed.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from typing import Any


class NotAvailable(Exception):
    """A requirement of a check is not available here."""


def unpacked(requirement: str, prefixes: tuple[str, ...], cache: Path) -> Path:
    """The directory with some files of a wheel, which is downloaded unless it exists.

    Args:
        requirement: a project and its exact version.
        prefixes: paths in the wheel of files, or of folders whose Python files are needed.
        cache: directory of wheels and files.

    Raises:
        NotAvailable: the package index has no such wheel, or can't be reached.
    """
    directory = cache / requirement.replace("==", "-")
    if not all((directory / prefix).exists() for prefix in prefixes):
        cache.mkdir(parents=True, exist_ok=True)
        project = requirement.partition("==")[0]
        if not list(cache.glob(f"{directory.name}-*.whl")):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            done = subprocess.run([*command, "-d", cache, requirement], capture_output=True, text=True, check=False)
            if done.returncode:
                raise NotAvailable(f"{requirement} can't be downloaded: {done.stderr.strip().splitlines()[-1]}")
        with zipfile.ZipFile(next(cache.glob(f"{directory.name}-*.whl"))) as wheel:
            names = [name for name in wheel.namelist() if name.startswith(prefixes) and name.endswith(".py")]
            # moved atomically, so an interrupted download is not taken for a complete one
            wheel.extractall(cache / f"{project}.part", names)
        shutil.rmtree(directory, ignore_errors=True)  # has fewer files, from another version of these checks
        (cache / f"{project}.part").rename(directory)
    return directory


class _StubType(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _stub(name)

    def __getitem__(cls, _: Any) -> _StubType:
        return cls


class Stub(metaclass=_StubType):
    """Does nothing, in any role: base class, decorator, logger, or a false switch."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls.__bases__ == (Stub,) and len(args) == 1 and callable(args[0]) and not kwargs:
            return args[0]  # used as a decorator
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _stub(name)

    def __bool__(self) -> bool:
        return False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) else None


def _stub(name: str) -> type[Stub]:
    return _StubType(name, (Stub,), {})


class _StubModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, _stub(name))
        return getattr(self, name)


class SourcesFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds all modules of one package: the real files of the wanted modules, stubs for all others.

    Args:
        package: top-level name.
        directory: contains the files.
        wanted: modules to load from there.
        given: module -> attributes of its stub, where an empty stub is not enough.
    """

    def __init__(self, package: str, directory: Path, wanted: tuple[str, ...], given: dict[str, dict[str, Any]]):
        self.package, self.directory, self.wanted, self.given = package, directory, wanted, given

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.partition(".")[0] != self.package:
            return None
        if fullname in self.wanted:
            file = self.directory.joinpath(*fullname.split(".")).with_suffix(".py")
            return importlib.util.spec_from_file_location(fullname, file)
        return importlib.util.spec_from_loader(fullname, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        module = _StubModule(spec.name)
        module.__dict__.update(self.given.get(spec.name, {}))
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass
