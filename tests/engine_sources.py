"""Single files of an engine's wheel as modules, and stubs in place of everything else that they import.

No package of the engine is imported: neither its `__init__` nor a compiled part runs, so that nothing that it depends
on has to be there.
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


class NotToBeHad(Exception):
    """What a check needs can't be had here."""


def unpacked(requirement: str, prefixes: tuple[str, ...], cache: Path) -> Path:
    """The directory with some files of a wheel, which is downloaded unless it is there.

    Args:
        requirement: a project and its exact version.
        prefixes: paths in the wheel of files, or of folders whose Python files are wanted.
        cache: where wheels and files are kept.

    Raises:
        NotToBeHad: the package index has no such wheel, or there is none.
    """
    directory = cache / requirement.replace("==", "-")
    if not all((directory / prefix).exists() for prefix in prefixes):
        cache.mkdir(parents=True, exist_ok=True)
        project = requirement.partition("==")[0]
        if not list(cache.glob(f"{directory.name}-*.whl")):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            done = subprocess.run([*command, "-d", cache, requirement], capture_output=True, text=True, check=False)
            if done.returncode:
                raise NotToBeHad(f"{requirement} can't be downloaded: {done.stderr.strip().splitlines()[-1]}")
        with zipfile.ZipFile(next(cache.glob(f"{directory.name}-*.whl"))) as wheel:
            names = [name for name in wheel.namelist() if name.startswith(prefixes) and name.endswith(".py")]
            # into place at once, so that what was cut off isn't taken for whole
            wheel.extractall(cache / f"{project}.part", names)
        shutil.rmtree(directory, ignore_errors=True)  # with fewer files, of another version of these checks
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
    """Does nothing, whatever it is used as: a class to inherit from, a decorator, a logger, a switch that is off."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls.__bases__ == (Stub,) and len(args) == 1 and callable(args[0]) and not kwargs:
            return args[0]  # a decorator
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
    """Finds all modules of one package: files where they are wanted, stubs elsewhere.

    Args:
        package: top-level name.
        directory: with the files.
        wanted: modules to be loaded from there.
        given: module -> what its stub has, where nothing won't do.
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
