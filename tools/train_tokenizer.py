"""Train ``examples/data/tokenizer.model``: a SentencePiece BPE model of the example corpus.

    python tools/train_tokenizer.py examples/data/austen.txt.xz --out examples/data/tokenizer.model

It needs the package ``sentencepiece``. One thread, so that the same package version gives the same file. The model is
lossless: text is neither normalised nor stripped, line breaks are one token, and what the vocabulary lacks becomes
bytes. Megatron reads it with ``--tokenizer-type SentencePieceTokenizer --tokenizer-model FILE``.
"""

from __future__ import annotations

import argparse
import io
import lzma
from pathlib import Path

import sentencepiece

VOCABULARY = 2048


def train(lines: list[str], vocabulary: int = VOCABULARY) -> bytes:
    """A serialized SentencePiece model.

    Args:
        lines: text to learn from, one paragraph each, without line breaks.
        vocabulary: number of tokens, among them ``<unk>`` 0, ``<s>`` 1, ``</s>`` 2 (end of document), ``<pad>`` 3, the
            line break 4 and the 256 bytes. A multiple of 128 needs no padding at any usual TP size.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        user_defined_symbols=["\n"],
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        max_sentence_length=1 << 20,
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("corpus", type=Path, help="text as tools/corpus.py writes it, .txt.xz")
    parser.add_argument("--out", type=Path, required=True, help="file to write, .model")
    arguments = parser.parse_args()
    text = lzma.decompress(arguments.corpus.read_bytes()).decode("utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("# ")]
    arguments.out.write_bytes(train(lines))
    tokens = sum(map(len, sentencepiece.SentencePieceProcessor(model_file=str(arguments.out)).encode(lines)))
    characters = sum(map(len, lines))
    print(f"{arguments.out}: {VOCABULARY} tokens; {characters:,} characters are {tokens:,} tokens")


if __name__ == "__main__":
    main()
