"""The bundled novels as characters: a small vocabulary, and batches that follow from the number of the step."""

from __future__ import annotations

import lzma
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from prepare_data import CORPUS, documents, split

VOCABULARY = 96
"""Size of the embedding: number 0 stands for every rare character, the last ones for none."""

RARE = 20
"""A character that the training text has fewer times is rare."""


@dataclass(frozen=True)
class Characters:
    """Two texts as numbers.

    Attributes:
        train: all training documents, one after the other.
        valid: all validation documents; no document is in both.
        known: the characters that have a number of their own, in order of these numbers, from 1 on.
    """

    train: torch.Tensor
    valid: torch.Tensor
    known: str

    def batch(self, step: int, seed: int, size: int, length: int) -> dict[str, torch.Tensor]:
        """``size`` pieces of the training text from places that depend on ``step`` and ``seed`` only."""
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        starts = torch.randint(len(self.train) - length, (size,), generator=generator)
        return _pieces(self.train, starts, length)

    def valid_batch(self, number: int, count: int, size: int, length: int) -> dict[str, torch.Tensor]:
        """The ``number``-th of ``count`` batches that are spread evenly over the validation text."""
        starts = torch.linspace(0, len(self.valid) - length - 1, count * size).long()
        return _pieces(self.valid, starts[number::count], length)


def _pieces(text: torch.Tensor, starts: torch.Tensor, length: int) -> dict[str, torch.Tensor]:
    rows = torch.stack([text[start : start + length + 1] for start in starts.tolist()])
    return {"tokens": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous()}


def number_characters(text: str) -> dict[str, int]:
    """Numbers from 1 on for the characters that are not rare, the most frequent first."""
    frequent = [(character, count) for character, count in Counter(text).items() if count >= RARE]
    frequent.sort(key=lambda pair: (-pair[1], pair[0]))
    return {character: number for number, (character, _) in enumerate(frequent[: VOCABULARY - 1], start=1)}


@cache
def load() -> Characters:
    """The bundled corpus, every twentieth chapter held out for validation."""
    train, valid = split(documents(lzma.decompress(CORPUS.read_bytes()).decode("utf-8")))
    numbers = number_characters("\n".join(train))

    def encoded(texts: list[str]) -> torch.Tensor:
        return torch.tensor([numbers.get(character, 0) for character in "\n".join(texts)], dtype=torch.long)

    return Characters(encoded(train), encoded(valid), "".join(numbers))
