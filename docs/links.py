"""A hook of MkDocs: pages link to files of the repository as GitHub shows them, with `../`, and the site follows.

Pictures outside docs/ are copied into the site; every other file is linked on GitHub. A link to a file that doesn't
exist stops the build.
"""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import normpath
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PICTURES = "benchmarks/results/*.png"
_LINK = re.compile(r"(\]\(|\]: )\.\./([^)#\s]+)")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Adds the pictures that pages show from outside docs/."""
    for picture in sorted(ROOT.glob(PICTURES)):
        path = picture.relative_to(ROOT).as_posix()
        files.append(File.generated(config, path, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, **_: Any) -> str:
    """Turns `../PATH` into the picture's place in the site, or PATH on GitHub.

    Raises:
        PluginError: there is no such file.
    """

    def replaced(match: re.Match[str]) -> str:
        path = normpath(match[2])
        if not (ROOT / path).exists():
            raise PluginError(f"{page.file.src_path} links to ../{match[2]}, which is not in the repository.")
        if path.endswith(".png"):
            return match[1] + path
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"{match[1]}{config['repo_url'].rstrip('/')}/{kind}/main/{path}"

    return _LINK.sub(replaced, markdown)
