"""The bundled text as training data for the harness."""

from __future__ import annotations

import functools
import lzma
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.megatron.harness import Data

EXAMPLE = Path(__file__).parents[2] / "examples" / "data"


@functools.cache
def tokens(vocabulary: int) -> torch.Tensor:
    """The text as token numbers, with all rarer tokens as one: a small model gets by with a small vocabulary."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(EXAMPLE / "tokenizer.model"))
    text = lzma.decompress((EXAMPLE / "austen.txt.xz").read_bytes()).decode()
    numbers = torch.tensor(processor.encode(text[:2_000_000]))
    ranks = torch.empty(processor.get_piece_size(), dtype=torch.long)
    ranks[numbers.bincount(minlength=len(ranks)).argsort(descending=True)] = torch.arange(len(ranks))
    return ranks[numbers].clamp_max(vocabulary - 1)


@dataclass(frozen=True)
class Text(Data):
    """Random passages of the bundled text.

    Attributes:
        order: seed of the choice of passages.
    """

    vocabulary: int = 1024
    sequence: int = 64
    global_batch: int = 16
    order: int = 0

    def tokens(self, step: int, sample: int) -> torch.Tensor:
        """See :meth:`Data.tokens`."""
        text = tokens(self.vocabulary)
        generator = torch.Generator().manual_seed(1_000_000 * self.order + 1000 * step + sample)
        start = int(torch.randint(len(text) - self.sequence - 1, (1,), generator=generator))
        return text[start : start + self.sequence + 1]
