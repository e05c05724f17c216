"""Build the site of the documentation in build/site: python docs/build_site.py

The pages are copied to build/docs first, and with them every file of the project that a page links to, as a page of
its own: the site is complete without a network.  Zensical checks links and anchors while it builds.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
CODE = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
UNSEARCHED = "---\nsearch: {exclude: true}\n---\n\n"


def copy_pages() -> None:
    """Write build/docs: the pages and pictures of docs/, and under project/ the files that they link to."""
    shutil.rmtree(BUILD / "docs", ignore_errors=True)
    todo = sorted(
        page for kind in ("md", "png", "svg", "ipynb", "js", "css") for page in (ROOT / "docs").rglob(f"*.{kind}")
    )
    done = set(todo)
    while todo:
        file = todo.pop()
        target = BUILD / "docs" / place(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".md":
            text, linked = with_links(file)
            target.write_text(text, encoding="utf-8")
            todo += sorted(linked - done)
            done |= linked
        elif target.suffix == ".md":
            code = file.read_text(encoding="utf-8")
            page = f"{UNSEARCHED}# {file.relative_to(ROOT)}\n\n```{file.suffix[1:]}\n{code}```\n"
            target.write_text(page, encoding="utf-8")
        else:
            shutil.copyfile(file, target)


def place(file: Path) -> Path:
    """Where the site has a file of the project."""
    if file.is_relative_to(ROOT / "docs"):
        return file.relative_to(ROOT / "docs")
    page = file if file.suffix in (".md", ".png") else file.with_suffix(f"{file.suffix}.md")
    return "project" / page.relative_to(ROOT)


def with_links(page: Path) -> tuple[str, set[Path]]:
    """A page with its links as the site needs them, and the files of the project that it links to."""
    linked: set[Path] = set()

    def moved(match: re.Match[str]) -> str:
        path, sign, anchor = match[0].partition("#")
        if not path or ":" in path:
            return match[0]
        target = Path(os.path.normpath(page.parent / path))
        if not target.is_file():
            raise SystemExit(f"{page.relative_to(ROOT)}: {path} is no file of the project")
        linked.add(target)
        return os.path.relpath(place(target), place(page).parent) + sign + anchor

    parts = CODE.split(page.read_text(encoding="utf-8"))
    return "".join(part if n % 2 else LINK.sub(moved, part) for n, part in enumerate(parts)), linked


if __name__ == "__main__":
    copy_pages()
    shutil.copyfile(ROOT / "docs" / "zensical.toml", BUILD / "zensical.toml")
    shutil.rmtree(BUILD / "site", ignore_errors=True)
    if subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=BUILD).returncode:
        sys.exit(1)
    print(f"the documentation: {BUILD / 'site' / 'index.html'}")
