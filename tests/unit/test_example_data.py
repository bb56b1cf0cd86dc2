"""The bundled corpus and tokenizer, the tools that made them, and the datasets made from them."""

from __future__ import annotations

import hashlib
import importlib.util
import lzma
import os
import struct
import sys
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

sentencepiece = pytest.importorskip("sentencepiece")

ROOT = Path(__file__).resolve().parents[2]


def load(path: str) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def prepare_data() -> ModuleType:
    return load("examples/prepare_data.py")


@pytest.fixture(scope="module")
def corpus_tool() -> ModuleType:
    return load("tools/corpus.py")


@pytest.fixture(scope="module")
def text(prepare_data: ModuleType) -> str:
    return lzma.decompress(prepare_data.CORPUS.read_bytes()).decode("utf-8")


def test_files_are_those_that_the_readme_describes(prepare_data: ModuleType, text: str) -> None:
    readme = (prepare_data.DATA / "README.md").read_text()
    assert hashlib.sha256(text.encode()).hexdigest() in readme
    assert hashlib.sha256(prepare_data.TOKENIZER.read_bytes()).hexdigest() in readme
    assert f"{len(text):,} characters" in readme
    assert f"{text.count('# ')} chapters" in readme


def test_corpus_is_the_novels_and_nothing_else(prepare_data: ModuleType, text: str) -> None:
    documents = prepare_data.documents(text)
    assert len(documents) == 50 + 61 + 48 + 55 + 31 + 24
    assert documents[50].startswith("It is a truth universally acknowledged, that a single man in possession of a good")
    assert documents[-1].endswith("in its national importance.")
    for intruder in ("Gutenberg", "Signet", "CHAPTER", "Chapter ", "FINIS", "THE END", "* * *", "_", "End volume"):
        assert intruder not in text, intruder


def test_split_holds_out_whole_chapters_of_every_novel(prepare_data: ModuleType, text: str) -> None:
    documents = prepare_data.documents(text)
    train, valid = prepare_data.split(documents)
    assert sorted(train + valid) == sorted(documents)
    assert not set(train) & set(valid)
    assert 0.03 < sum(map(len, valid)) / sum(map(len, documents)) < 0.07


def test_tokenizer_is_lossless(prepare_data: ModuleType, text: str) -> None:
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(prepare_data.TOKENIZER))
    assert len(tokenizer) == 2048
    for sample in (text[:100_000], ' leading,  double and trailing \n\n"blanks" ', "unknown: é — 中文 \t"):
        assert tokenizer.decode(tokenizer.encode(sample)) == sample


def test_tokenizer_is_what_the_tool_trains(prepare_data: ModuleType, text: str) -> None:
    tool = load("tools/train_tokenizer.py")
    lines = [line for line in text.splitlines() if not line.startswith("# ")]
    expected = sentencepiece.SentencePieceProcessor(model_file=str(prepare_data.TOKENIZER))
    trained = sentencepiece.SentencePieceProcessor(model_proto=tool.train(lines))
    assert [trained.id_to_piece(i) for i in range(2048)] == [expected.id_to_piece(i) for i in range(2048)]


def test_datasets_hold_the_documents_and_are_made_once(
    prepare_data: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    corpus = tmp_path / "small.txt.xz"
    corpus.write_bytes(lzma.compress("".join(f"# {i}\nfirst of {i}\nsecond\n" for i in range(25)).encode()))
    data = prepare_data.prepare(tmp_path / "data", corpus)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=data.tokenizer)
    train, valid = (indexed_dataset.IndexedDataset(prefix) for prefix in (data.train, data.valid))
    assert len(train) == 24
    assert len(valid) == 1
    assert train[3].tolist() == [*tokenizer.encode("first of 3\nsecond"), tokenizer.eos_id()]
    assert valid[0].tolist() == [*tokenizer.encode("first of 10\nsecond"), tokenizer.eos_id()]
    assert sum(map(len, train)) == data.train_tokens

    contents = {path: path.read_bytes() for path in (Path(data.train + ".bin"), Path(data.train + ".idx"))}
    monkeypatch.setattr(prepare_data, "_build", lambda *_: pytest.fail("the datasets were made again"))
    assert prepare_data.prepare(tmp_path / "data", corpus) == data
    monkeypatch.undo()
    again = prepare_data.prepare(tmp_path / "elsewhere", corpus)
    assert Path(again.train).parent.name == Path(data.train).parent.name
    assert {path: (Path(again.train).parent / path.name).read_bytes() for path in contents} == contents

    corpus.write_bytes(lzma.compress("".join(f"# {i}\nother {i}\n" for i in range(25)).encode()))
    assert prepare_data.prepare(tmp_path / "data", corpus).train != data.train


def test_a_failed_preparation_leaves_nothing(prepare_data: ModuleType, tmp_path: Path) -> None:
    corpus = tmp_path / "tiny.txt.xz"
    corpus.write_bytes(lzma.compress(b"# one\nalone\n"))
    with pytest.raises(ValueError, match="1 documents are too few"):
        prepare_data.prepare(tmp_path / "data", corpus)
    assert not os.listdir(tmp_path / "data")  # noqa: PTH208


def test_chapters_without_what_surrounds_them(corpus_tool: ModuleType) -> None:
    lines = """EMMA

By Jane Austen

VOLUME I

CHAPTER I

One _wrapped_
  paragraph.

       * * * * *

Another.

[End volume one of this edition.
Printed by T. and A. Constable]

VOLUME II

CHAPTER II

Last.

FINIS

After.
""".splitlines()
    assert list(corpus_tool.chapters(lines)) == [["One wrapped paragraph.", "Another."], ["Last."]]


def serialized(value: Any) -> bytes:
    """R's serialization of lists, integers and strings, as far as a test needs it."""
    if isinstance(value, str):
        data = value.encode()
        return struct.pack(">ii", 0x00040009, len(data)) + data
    if isinstance(value, dict):
        items = b"".join(map(serialized, value.values()))
        names = serialized(list(value))
        symbol = struct.pack(">i", 1) + serialized("names")
        attributes = struct.pack(">i", 0x402) + symbol + names + struct.pack(">i", 254)
        return struct.pack(">ii", 0x213, len(value)) + items + attributes
    if value and isinstance(value[0], int):
        return struct.pack(f">ii{len(value)}i", 13, len(value), *value)
    return struct.pack(">ii", 16, len(value)) + b"".join(map(serialized, value))


def test_reading_an_r_database(corpus_tool: ModuleType, tmp_path: Path) -> None:
    header = b"X\n" + struct.pack(">iii", 2, 0, 0)
    pieces, index = b"", {}
    for name, lines in {"emma": ["EMMA", "", "£5"], "persuasion": ["Persuasion"]}.items():
        raw = header + serialized(lines)
        piece = struct.pack(">I", len(raw)) + zlib.compress(raw)
        index[name] = [len(pieces), len(piece)]
        pieces += piece
    (tmp_path / "Rdata.rdb").write_bytes(pieces)
    (tmp_path / "Rdata.rdx").write_bytes(zlib.compress(header + serialized({"variables": index})))
    assert corpus_tool.read_database(tmp_path) == {"emma": ["EMMA", "", "£5"], "persuasion": ["Persuasion"]}
