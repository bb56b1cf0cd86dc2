"""Make ``examples/data/austen.txt.xz`` again from the files of the package it comes from.

The corpus is Jane Austen's six completed novels as the R package *janeaustenr* ships them (Debian:
``r-cran-janeaustenr``). R keeps a package's data in a "lazy-load" database: ``Rdata.rdx`` is the index and
``Rdata.rdb`` holds one compressed, serialized object for each novel, a vector of lines. R is not needed to read it:

    apt-get install r-cran-janeaustenr
    python tools/corpus.py PACKAGE_FOLDER --out examples/data/austen.txt.xz

``PACKAGE_FOLDER`` is the installed package (``dpkg -L r-cran-janeaustenr`` names it; it holds ``data/Rdata.rdb``).
The format of the result and what was changed in the text are described in ``examples/data/README.md``.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NOVELS = {
    "sensesensibility": "Sense and Sensibility",
    "prideprejudice": "Pride and Prejudice",
    "mansfieldpark": "Mansfield Park",
    "emma": "Emma",
    "northangerabbey": "Northanger Abbey",
    "persuasion": "Persuasion",
}

_CHAPTER = re.compile(r"chapter ([ivxl]+|\d+)", re.IGNORECASE)
_VOLUME = re.compile(r"volume [ivx]+", re.IGNORECASE)
_END = re.compile(r"finis|the end|a note on the text", re.IGNORECASE)
# What later printers and transcribers put between the author's paragraphs.
_NOT_THE_AUTHOR = re.compile(r"\[(End volume|At this point in).*|Printed by T\. and A\. Constable.*|[* ]+")


class _Serialized:
    """Reader of R's binary serialization (XDR, versions 2 and 3), as far as an index and lines of text need it.

    The format is described in "R Internals", section "Serialization Formats".
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._references: list[Any] = []

    def read(self) -> Any:
        """The object: a list, a dict for what has names, a string or None."""
        if self._data[:2] != b"X\n":
            raise ValueError("not an R object in XDR form (it must begin with b'X\\n')")
        self._at = 2
        version, _, _ = (self._integer() for _ in range(3))
        if version == 3:
            self._bytes(self._integer())  # name of the native encoding
        return self._item()

    def _bytes(self, count: int) -> bytes:
        self._at += count
        return self._data[self._at - count : self._at]

    def _integer(self) -> int:
        return struct.unpack(">i", self._bytes(4))[0]

    def _item(self) -> Any:
        flags = self._integer()
        kind, has_attributes = flags & 0xFF, bool(flags & 0x200)
        if kind == 254:  # NULL
            return None
        if kind == 255:  # a symbol seen before
            return self._references[(flags >> 8) - 1]
        if kind == 1:  # symbol
            self._references.append(self._item())
            return self._references[-1]
        if kind == 9:  # string
            length = self._integer()
            return None if length < 0 else self._bytes(length).decode("utf-8")
        if kind == 2:  # pair list; of attributes here
            return self._pairs()
        if kind in (10, 13):  # logical, integer
            count = self._integer()
            values: list[Any] = list(struct.unpack(f">{count}i", self._bytes(4 * count)))
        elif kind in (16, 19):  # strings, list
            values = [self._item() for _ in range(self._integer())]
        else:
            raise ValueError(f"R object of type {kind} at byte {self._at}: not expected in a package of texts")
        names = self._item().get("names") if has_attributes else None
        return dict(zip(names, values, strict=True)) if names else values

    def _pairs(self) -> dict[str, Any]:
        pairs = {}
        self._at -= 4
        while (flags := self._integer()) & 0xFF == 2:
            tag = self._item() if flags & 0x400 else None
            pairs[tag] = self._item()
        return pairs


def read_database(folder: Path) -> dict[str, Any]:
    """All objects of an R lazy-load database.

    Args:
        folder: holds ``Rdata.rdb`` and ``Rdata.rdx``.

    Raises:
        FileNotFoundError: if one of the two is missing.
        ValueError: if they are not in the form that R 3.5 to 4 writes.
    """
    index = _Serialized(zlib.decompress((folder / "Rdata.rdx").read_bytes(), wbits=47)).read()
    data = (folder / "Rdata.rdb").read_bytes()
    # Each piece is its uncompressed length (4 bytes) and a zlib stream.
    return {
        name: _Serialized(zlib.decompress(data[start + 4 : start + length])).read()
        for name, (start, length) in index["variables"].items()
    }


def _paragraphs(lines: list[str]) -> Iterator[str]:
    """Paragraphs on one line each: unwrapped, blanks collapsed, underscores of italics removed."""
    paragraph: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            text = " ".join(" ".join(paragraph).replace("_", "").split())
            if not _NOT_THE_AUTHOR.fullmatch(text):
                yield text
            paragraph = []


def chapters(lines: list[str]) -> Iterator[list[str]]:
    """The chapters of one novel, each a list of paragraphs; what is before the first and after the end is left out."""
    current: list[str] | None = None
    for line in lines:
        heading = line.strip()
        ended = bool(_END.fullmatch(heading))
        if ended or _CHAPTER.fullmatch(heading) or _VOLUME.fullmatch(heading):
            if current:
                yield list(_paragraphs(current))
            if ended:
                return
            current = [] if _CHAPTER.fullmatch(heading) else None
        elif current is not None:
            current.append(line)
    if current:
        yield list(_paragraphs(current))


def corpus(novels: dict[str, list[str]]) -> str:
    """The whole text: for each chapter a line ``# Title, chapter N`` and one line a paragraph."""
    lines = []
    for name, title in NOVELS.items():
        for number, paragraphs in enumerate(chapters(novels[name]), start=1):
            lines += [f"# {title}, chapter {number}", *paragraphs]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("package", type=Path, help="folder of the R package janeaustenr; holds data/Rdata.rdb")
    parser.add_argument("--out", type=Path, required=True, help="file to write, .txt.xz")
    arguments = parser.parse_args()
    try:
        text = corpus(read_database(arguments.package / "data"))
    except FileNotFoundError as error:
        parser.error(f"{error.filename} does not exist: PACKAGE must be the installed package's folder")
    arguments.out.write_bytes(lzma.compress(text.encode("utf-8"), preset=9 | lzma.PRESET_EXTREME))
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    print(f"{arguments.out}: {text.count('# ')} chapters, {len(text):,} characters; sha256 of the text {digest}")


if __name__ == "__main__":
    main()
