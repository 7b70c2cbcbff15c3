"""MkDocs' hook for the documentation site: what documents link to outside of docs/ joins the site.

Links between documents are relative paths in the repository, so they work in an editor and on a Git host. On the site
README.md is the first page, docs/ is the root, and whatever else is linked to keeps its path in the repository:
Markdown becomes a page, all else is copied. A link that names nothing stays as it is, so a strict build reports it.
"""

# mkdocs comes with the extra `docs`, which need not be installed where this file is checked.
# pyright: reportMissingImports=false
from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
_HOME = "README.md"
_PAGES = (_HOME, "CONTRIBUTING.md", "CHANGELOG.md")
_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages beside docs/, and all files that they and the pages in docs/ link to."""
    waiting = [*_PAGES, *(_in_repository(file) for file in files if file.src_uri.endswith(".md"))]
    known = set(waiting)
    while waiting:
        name = waiting.pop()
        if not name.startswith("docs/"):
            files.append(File.generated(config, _on_site(name), abs_src_path=str(ROOT / name)))
        if name.endswith(".md"):
            linked = {found for link in _LINK.findall(_text(name)) if (found := _target(name, link))}
            new = {each for each in linked - known if not each.startswith("docs/")}
            known |= new
            waiting += sorted(new)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at where their files are on the site."""
    name = _in_repository(page.file)

    def moved(link: re.Match[str]) -> str:
        found = _target(name, link[1])
        return link[1] if found is None else os.path.relpath(_on_site(found), PurePosixPath(_on_site(name)).parent)

    return _LINK.sub(moved, markdown)


def _in_repository(file: File) -> str:
    return Path(file.abs_src_path or "").resolve().relative_to(ROOT).as_posix()


def _on_site(name: str) -> str:
    """The path in the site's sources of a path in the repository."""
    return "index.md" if name == _HOME else name.removeprefix("docs/")


def _target(name: str, link: str) -> str | None:
    """The path in the repository that a page's link names; None for an address, and where there is nothing."""
    if "://" in link:
        return None
    path = (ROOT / name).parent.joinpath(link).resolve()
    path = path / _HOME if path.is_dir() else path
    return path.relative_to(ROOT).as_posix() if path.is_file() and path.is_relative_to(ROOT) else None


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")
