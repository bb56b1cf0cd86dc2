"""``python tools/site.py``: the documents as a site, in ``build/docs/site``; what ``make docs`` runs.

Needs mkdocs-material (the extra ``docs``) and nothing of this package. A page that ``mkdocs.yml`` does not list, and a
link or an anchor that leads nowhere, end it with status 1.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = Path("build") / "docs" / "source"
DOCUMENTS = ("*.md", "docs/**/*.md", "patches/**/*.md", "examples/**/*.md")
LINK = re.compile(r"\]\(([^)#:\s]+)")


def copy_documents(root: Path, target: Path) -> None:
    """Copy the documents, and the files that they link to, to the places that they have in the repository."""
    shutil.rmtree(target, ignore_errors=True)
    documents = {path for pattern in DOCUMENTS for path in root.glob(pattern)}
    linked = {(path.parent / name).resolve() for path in documents for name in LINK.findall(path.read_text())}
    for path in documents | {path for path in linked if path.is_file()}:
        copy = target / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    shutil.copyfile(root / "tools" / "site.css", target / "site.css")
    front = target / "README.md"  # its report is wide, and it has few headings: the whole width for it
    front.write_text(f"---\nhide: [toc]\n---\n\n{front.read_text()}")


def main() -> int:
    """Copy and build; the exit status of mkdocs."""
    copy_documents(ROOT, ROOT / SOURCE)
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", *sys.argv[1:]]
    return subprocess.run(line, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}).returncode


if __name__ == "__main__":
    sys.exit(main())
