"""Copies the pages and what they link to into one folder, for `nox -s docs` to build a site from.

Files keep their places, so that the links of a page lead to the same files as on GitHub. Only GitHub shows a folder as
a page, so a link to a folder becomes plain text.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("*.md", "docs/*.md", "docs/notebook/*.md", "kernels/*.md", "results/*.md")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)#\s]+)|!\[[^\]]*\]\(([^)\s]+)")
FOLDER_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?![a-z]+:)[^)\s]*/\)")


def pages() -> list[Path]:
    """All pages of the project."""
    return [page for pattern in PAGES for page in sorted(ROOT.glob(pattern))]


def linked(page: Path) -> set[Path]:
    """Files of the project that a page links to or shows, other pages among them."""
    targets = {first or second for first, second in LINK.findall(page.read_text(encoding="utf-8"))}
    return {path for target in targets if "://" not in target and (path := (page.parent / target).resolve()).is_file()}


def gather(folder: Path) -> None:
    """Make `folder` anew: the settings of the site, and in `pages` what it consists of."""
    shutil.rmtree(folder, ignore_errors=True)
    for source in {*pages(), *(path for page in pages() for path in linked(page))}:
        target = folder / "pages" / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".md":
            target.write_text(FOLDER_LINK.sub(r"\1", source.read_text(encoding="utf-8")), encoding="utf-8")
        else:
            shutil.copyfile(source, target)
    shutil.copyfile(ROOT / "docs" / "site" / "zensical.toml", folder / "zensical.toml")


if __name__ == "__main__":
    gather(Path(sys.argv[1]))
