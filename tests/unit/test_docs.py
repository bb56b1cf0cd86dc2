"""What the documents say of flags and files is what there is."""

import dataclasses
import re
from pathlib import Path

import pytest

from megatron_muon import MuonConfig
from megatron_muon.plugin import spellings
from tools import flags_page, site

ROOT = Path(__file__).parents[2]


def test_flags_are_documented_from_their_one_source() -> None:
    assert flags_page.FILE.read_text() == flags_page.render(), "run: python -m tools.docs"
    listed = [name for _, names in flags_page.SUBJECTS.values() for name in names.split()]
    assert sorted(listed) == sorted(field.name for field in dataclasses.fields(MuonConfig))


def test_a_flag_without_a_subject_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(flags_page.SUBJECTS, "Memory")
    with pytest.raises(ValueError, match=r"^master, momentum_dtype, offload: give each a place in SUBJECTS"):
        flags_page.render()


def test_spellings_of_others_are_those_that_the_parser_knows() -> None:
    page = (ROOT / "docs" / "migrating.md").read_text()
    rows = dict(re.findall(r"^\| `(--[\w-]+)` \| (.*) \|$", page, re.MULTILINE))
    known = {name: f"{value}, taken as that" for name, value in spellings.RENAMED.items()} | spellings.ELSEWHERE
    assert {name: text.replace("`", "") for name, text in rows.items()} == known


def test_code_of_migrating_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "migrating.md").read_text(), re.DOTALL)
    exec(code, {})


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
