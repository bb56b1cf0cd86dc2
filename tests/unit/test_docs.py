"""What the documents say of flags and files is what there is."""

import dataclasses
import re
from pathlib import Path

from megatron_muon import MuonConfig
from megatron_muon.config import flag

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


def test_links_between_documents_lead_somewhere() -> None:
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "patches").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
