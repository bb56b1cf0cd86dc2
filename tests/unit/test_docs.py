"""What the documents say of flags and files is what there is."""

import dataclasses
import re
from pathlib import Path

from megatron_muon import MuonConfig
from megatron_muon.config import flag
from tools import site

ROOT = Path(__file__).parents[2]


def test_readme_lists_every_flag_with_its_default() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith(("| `--muon", "| `--layer-wise"))]
    documented = {re.findall(r"`(--[a-z0-9-]*)`", row)[0]: row.split("|")[2].strip() for row in rows}
    assert set(documented) == {flag(field.name) for field in dataclasses.fields(MuonConfig)}
    for field in dataclasses.fields(MuonConfig):
        text = documented[flag(field.name)]
        if isinstance(field.default, bool):
            assert text == ("on" if field.default else "off"), field.name
        elif isinstance(field.default, tuple):
            assert text == "" and field.default == (), field.name
        elif isinstance(field.default, (int, float)):
            assert float(text) == field.default, field.name
        else:
            assert text == field.default, field.name


DOCUMENTS = [path for pattern in site.DOCUMENTS for path in sorted(ROOT.glob(pattern))]


def anchors(document: Path) -> set[str]:
    """What links may name in a document: its headings, as forges and the site spell them."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.+?)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_documents_lead_somewhere() -> None:
    lost = []
    for document in DOCUMENTS:
        for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)]+))?\)", document.read_text()):
            path = document.parent / target if target else document
            if not path.exists() or (anchor and anchor not in anchors(path)):
                lost.append(f"{document.relative_to(ROOT)}: {target}#{anchor}")
    assert not lost, "\n".join(lost)


def test_the_site_lists_every_document_once() -> None:
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    listed = re.findall(r"([\w/.-]+\.md)$", nav, re.MULTILINE)
    assert sorted(listed) == sorted(str(path.relative_to(ROOT)) for path in DOCUMENTS), "mkdocs.yml, nav"
