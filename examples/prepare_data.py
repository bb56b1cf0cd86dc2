"""Turn the example corpus into Megatron's indexed datasets, once.

    python examples/prepare_data.py [--out runs/data]

Chapters are the documents; every twentieth is held out for validation. The result is cached in a folder whose name is a
hash of all that it depends on, and it appears there whole or not at all, so an interrupted run does no harm. The two
printed prefixes are what Megatron's ``--train-data-path`` and ``--valid-data-path`` take.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import sentencepiece

DATA = Path(__file__).resolve().parent / "data"
CORPUS = DATA / "austen.txt.xz"
TOKENIZER = DATA / "tokenizer.model"

VALIDATION_EVERY = 20  # one chapter in so many is held out: about 5 % of the text, spread over all novels
FORMAT = 1  # raised when the same inputs would give other files


@dataclass(frozen=True)
class PreparedData:
    """Where the datasets are.

    Attributes:
        train: prefix of the training set's ``.bin`` and ``.idx``.
        valid: prefix of the validation set's.
        cache: folder for the index files that Megatron itself caches.
        tokenizer: SentencePiece model for ``--tokenizer-model``.
        train_tokens: number of tokens, ends of documents included.
        valid_tokens: likewise.
    """

    train: str
    valid: str
    cache: str
    tokenizer: str
    train_tokens: int
    valid_tokens: int


def documents(text: str) -> list[str]:
    """The documents of a corpus text: what stands between two lines that begin with ``# ``, without these lines."""
    return ["\n".join(part.splitlines()[1:]) for part in ("\n" + text).split("\n# ")[1:]]


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """Training and validation documents; no document is in both."""
    held_out = {i for i in range(len(documents)) if i % VALIDATION_EVERY == VALIDATION_EVERY // 2}
    train = [document for i, document in enumerate(documents) if i not in held_out]
    return train, [documents[i] for i in sorted(held_out)]


def content_key(corpus: Path, tokenizer: Path) -> str:
    """A short hash of everything that determines the datasets."""
    digest = hashlib.sha256(f"{FORMAT} {VALIDATION_EVERY} {sentencepiece.__version__} ".encode())
    for path in (corpus, tokenizer):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def _write(prefix: Path, documents: list[str], tokenizer: sentencepiece.SentencePieceProcessor) -> int:
    # Imported here: it takes seconds, and a later run finds the datasets made.
    import numpy as np

    from megatron_muon.cpu import messages

    messages.hide()  # this needs no GPU, and the next import tells that there is none
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path

    builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=np.uint16)
    tokens = 0
    for ids in tokenizer.encode(documents):
        ids.append(tokenizer.eos_id())
        builder.add_document(np.array(ids, dtype=np.uint16), [len(ids)])
        tokens += len(ids)
    builder.finalize(get_idx_path(str(prefix)))
    return tokens


def _build(folder: Path, corpus: Path, tokenizer: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    train, valid = split(documents(lzma.decompress(corpus.read_bytes()).decode("utf-8")))
    if not train or not valid:
        raise ValueError(
            f"{corpus}: {len(train) + len(valid)} documents are too few for a training and a validation set; each "
            f"begins with a line '# title', and {VALIDATION_EVERY} are enough"
        )
    counts = {
        "train_tokens": _write(folder / "train", train, processor),
        "valid_tokens": _write(folder / "valid", valid, processor),
    }
    (folder / "data.json").write_text(json.dumps(counts) + "\n")


def prepare(out: Path, corpus: Path = CORPUS, tokenizer: Path = TOKENIZER) -> PreparedData:
    """Build the datasets under ``out`` unless they are there.

    Args:
        out: folder that may hold the datasets of several corpora.
        corpus: ``.txt.xz`` as ``tools/corpus.py`` writes it.
        tokenizer: SentencePiece model.

    Raises:
        FileNotFoundError: if an input is missing.
        ValueError: if the corpus has too few documents to split.
    """
    folder = out / content_key(corpus, tokenizer)
    if not (folder / "data.json").exists():
        partial = out / f".partial-{os.getpid()}"
        partial.mkdir(parents=True)
        try:
            _build(partial, corpus, tokenizer)
            try:
                partial.rename(folder)
            except OSError:  # another process was first; its files are the same
                if not (folder / "data.json").exists():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    counts = json.loads((folder / "data.json").read_text())
    return PreparedData(
        train=str(folder / "train"),
        valid=str(folder / "valid"),
        cache=str(folder / "cache"),
        tokenizer=str(tokenizer),
        **counts,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/data"), help="folder for the datasets (%(default)s)")
    parser.add_argument("--corpus", type=Path, default=CORPUS, help=".txt.xz with documents (the bundled one)")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER, help="SentencePiece model (the bundled one)")
    arguments = parser.parse_args()
    for name, value in asdict(prepare(arguments.out, arguments.corpus, arguments.tokenizer)).items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
