"""Description of the package on PyPI: README.md with absolute links. pyproject.toml has all other metadata."""

import re
from pathlib import Path

ROOT = Path(__file__).parent
_LINK = re.compile(r"\]\((?!#|\w+:)([^)\s]+)\)")


def project_url(name: str) -> str:
    """A URL in [project.urls] of pyproject.toml, parsed with a regular expression: Python 3.10 has no tomllib."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(rf'^{name} = "(.+)"$', text, re.MULTILINE)[1]


def description() -> str:
    """README.md with absolute links to the documentation site, to image files and to other files on GitHub."""
    source, site = project_url("Source"), project_url("Documentation")
    raw = source.replace("https://github.com/", "https://raw.githubusercontent.com/")

    def absolute(match: re.Match) -> str:
        path, hash_sign, anchor = match[1].partition("#")
        page = re.fullmatch(r"docs/(.+)\.md", path)
        if page:
            place = f"{site}/" if page[1] == "index" else f"{site}/{page[1]}/"
        elif path.endswith(".png"):
            place = f"{raw}/main/{path}"
        else:
            place = f"{source}/blob/main/{path}"
        return f"]({place}{hash_sign}{anchor})"

    return _LINK.sub(absolute, (ROOT / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    from setuptools import setup

    setup(long_description=description(), long_description_content_type="text/markdown")
