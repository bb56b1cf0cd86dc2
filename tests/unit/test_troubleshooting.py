"""``docs/troubleshooting.md`` has every message that the package raises, and none that it does not."""

from __future__ import annotations

import re
from pathlib import Path

from tools.messages import has_words, messages

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"

PUT_TOGETHER = {
    ("checkpoint/errors.py", "fail"),  # problems of a checkpoint that all ranks share
    ("checkpoint/pickles.py", "find_class"),  # taken by read(), next
    ("checkpoint/pickles.py", "read"),
    ("checkpoint/writing.py", "_append"),  # a signal that stops `ckpt convert`
    ("choices.py", "parse_transfer"),  # taken by the check of --muon-transfer
    ("config.py", "validate"),  # refused values: docs/refusals.md
    ("cpu/mamba.py", "_refuse_packing"),  # the words of GatedDeltaNet's
    ("optimizers/joint.py", "_of"),  # a KeyError, as of a dictionary
    ("optimizers/muon.py", "_check_group"),  # a weight's name and the words of the layout
    ("optimizers/muon.py", "refuse_options"),  # docs/refusals.md
    ("planning/survey.py", "plan"),  # what the planner said of the mode
    ("plugin/nonfinite.py", "_refuse_unequal"),  # the words of unequal_gradients
    ("plugin/spellings.py", "parse_known_args"),  # names of flags
    ("refusals/rule.py", "refuse"),  # docs/refusals.md
    ("refusals/rule.py", "__getitem__"),  # taken by the walk over the rows
}
"""File and function of messages whose words are elsewhere, and checked there."""


def phrases() -> list[re.Pattern[str]]:
    """The words to look for, ``...`` standing for anything."""
    found = re.findall(r"\*\*`([^`]+)`\*\*", PAGE.read_text())
    parts = ([re.escape(part) for part in re.sub(r"\s+", " ", phrase).split("...")] for phrase in found)
    return [re.compile(".+".join(part), re.DOTALL) for part in parts]


def test_every_message_is_explained() -> None:
    known = phrases()
    missing = [each for each in messages() if has_words(each.text) and not any(one.search(each.text) for one in known)]
    assert not missing, f"without an entry in docs/troubleshooting.md: {missing}"


def test_every_entry_is_raised() -> None:
    texts = [message.text for message in messages()]
    unknown = [one.pattern for one in phrases() if not any(one.search(text) for text in texts)]
    assert not unknown, f"in docs/troubleshooting.md, and raised by nothing: {unknown}"


def test_messages_without_words_are_known() -> None:
    assert {(each.place, each.function) for each in messages() if not has_words(each.text)} == PUT_TOGETHER
