"""Documents in files: a text file, a line of JSONL, or a record of ArrayRecord is one.

A document is found once, when the index is made, and read again a piece at a time, at the cost of a piece: by its place in
the file. Its bytes are as they are in the file; decoding them is up to the reader.
"""

import io
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from io import BufferedIOBase, BufferedReader
from typing import Any, Protocol, runtime_checkable

from jaxmem.training.json_text import JsonText, json_object, unescape, written_bytes
from jaxmem.training.sources import DataReport, SourceFile
from jaxmem.training.spill import Spill


@runtime_checkable
class Format(Protocol):
    """How the documents of one kind of file are found and read. `scan` and `read` raise OSError."""

    def scan(self, file: SourceFile, report: DataReport) -> Iterator[tuple[int, BufferedIOBase]]:
        """All documents in order: where each one is, and its bytes. What is no document goes into the report."""
        ...

    def places(self, document: BufferedIOBase, pieces: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, int, bytes]]:
        """Of pieces (start, bytes) of a document from `scan`: the start and size by which `read` finds each; its bytes."""
        ...

    def read(self, path: str, position: int, start: int, size: int) -> bytes:
        """The bytes of a piece, by the position of its document and its place there."""
        ...

    def size_of(self, path: str, position: int, start: int, size: int, n_bytes: int) -> int:
        """Of a piece's first `n_bytes`, the size by which `read` finds them."""
        ...


class _ByOffset:
    """A piece stands in its document as it is."""

    def places(self, document: BufferedIOBase, pieces: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, int, bytes]]:
        """Offset and size."""
        return ((start, len(raw), raw) for start, raw in pieces)

    def size_of(self, path: str, position: int, start: int, size: int, n_bytes: int) -> int:
        """As many."""
        return n_bytes


class TextFile(_ByOffset):
    """A file is one document."""

    def scan(self, file: SourceFile, report: DataReport) -> Iterator[tuple[int, BufferedIOBase]]:
        """The file itself, at position 0."""
        with open_regular(file.path) as stream:
            yield 0, stream

    def read(self, path: str, position: int, start: int, size: int) -> bytes:
        """Bytes of the file."""
        with open_regular(path) as stream:
            stream.seek(position + start)
            return stream.read(size)


class JsonLines:
    """A line is a JSON object whose `field` is a document; positions are byte offsets of lines.

    A piece is a part of a JSON string, so that reading one does not parse its line.
    """

    def __init__(self, field: str) -> None:
        self._field = field

    def scan(self, file: SourceFile, report: DataReport) -> Iterator[tuple[int, BufferedIOBase]]:
        """Every line but blank ones."""
        position = 0
        with open_regular(file.path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        document = self._parse(line)
                    except OSError as error:
                        report.undecodable_bytes += undecodable_bytes(line)
                        report.unreadable_because(f"{file.name}:{number}", error)
                    else:
                        yield position, document
                position += len(line)

    def places(self, document: BufferedIOBase, pieces: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, int, bytes]]:
        """Offset from the beginning of the line and size of the part of a JSON string."""
        return document.places(pieces)

    def read(self, path: str, position: int, start: int, size: int) -> bytes:
        """The text that a part of a JSON string stands for."""
        return unescape(TextFile().read(path, position, start, size))

    def size_of(self, path: str, position: int, start: int, size: int, n_bytes: int) -> int:
        """Of the part of the string."""
        return written_bytes(TextFile().read(path, position, start, size), 0, n_bytes)

    def _parse(self, line: bytes) -> JsonText:
        record = json_object(line)
        if record is None:
            raise OSError("not a JSON object")
        text = record.get(self._field)
        if not isinstance(text, str):
            raise OSError(f"no text in field {self._field!r}")
        return JsonText(line, self._field, text)


class ArrayRecords(_ByOffset):
    """A record is a document: the `field` of a JSON object, or else text as it is; positions are record numbers.

    A record can only be read whole, so long ones are kept apart when they are first read.
    """

    BLOCK_RECORDS = 64
    LONG_BYTES = 1 << 20

    def __init__(self, field: str) -> None:
        self._field = field
        self._readers: dict[str, Any] = {}
        self._long = Spill()

    def scan(self, file: SourceFile, report: DataReport) -> Iterator[tuple[int, BufferedIOBase]]:
        """Every record, read in blocks."""
        count = self._reader(file.path).num_records()
        for first in range(0, count, self.BLOCK_RECORDS):
            for position, document in self._block(file, range(first, min(first + self.BLOCK_RECORDS, count)), report):
                if document.getbuffer().nbytes >= self.LONG_BYTES:
                    self._long.keep((file.path, position), document.getvalue())
                yield position, document

    def read(self, path: str, position: int, start: int, size: int) -> bytes:
        """A part of the text of the record with a number."""
        os.stat(path)
        if (kept := self._long.read((path, position), start, size)) is not None:
            return kept
        return self._read(path, [position])[0].getvalue()[start : start + size]

    def _block(self, file: SourceFile, positions: range, report: DataReport) -> Iterator[tuple[int, io.BytesIO]]:
        """The readable records of a block: a bad one spoils the whole read, so it is cornered by halving."""
        try:
            documents = self._read(file.path, positions)
        except OSError as error:
            if len(positions) == 1:
                report.unreadable_because(f"{file.name}:{positions[0]}", error)
                return
            half = len(positions) // 2
            yield from self._block(file, positions[:half], report)
            yield from self._block(file, positions[half:], report)
        else:
            yield from zip(positions, documents)

    def _read(self, path: str, positions: Sequence[int]) -> list[io.BytesIO]:
        try:
            records = self._reader(path).read(list(positions))
        except RuntimeError as error:
            raise OSError(str(error)) from error
        texts = [(json_object(record) or {}).get(self._field) for record in records]
        return [
            io.BytesIO(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else record)
            for text, record in zip(texts, records)
        ]

    def _reader(self, path: str) -> Any:
        """An open reader, kept: opening one costs twenty times as much as reading a record."""
        if path not in self._readers:
            from array_record.python import array_record_module

            open_regular(path).close()
            reader = array_record_module.ArrayRecordReader(path)
            if not reader.ok():
                raise OSError("not a complete ArrayRecord file")
            self._readers[path] = reader
        return self._readers[path]


class Formats:
    """What reads a path, by its extension: .jsonl, .array_record or .arrayrecord, and text for all others."""

    def __init__(self, field: str) -> None:
        self._text, self._records = TextFile(), ArrayRecords(field)
        self._of = {".jsonl": JsonLines(field), ".array_record": self._records, ".arrayrecord": self._records}

    def __call__(self, path: str) -> Format:
        """The format of a path."""
        return self._of.get(os.path.splitext(path)[1].lower(), self._text)

    def is_text(self, path: str) -> bool:
        """Whether a file should be UTF-8 text as it is."""
        return self(path) is not self._records


def open_regular(path: str) -> BufferedReader:
    """A file for reading; a pipe or a device, whose opening or reading might never end, is refused."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("not a regular file")
    return open(path, "rb")


def undecodable_bytes(raw: bytes) -> int:
    r"""How many bytes are not part of any UTF-8 character.

    >>> undecodable_bytes(b"caf\xe9 \xff")
    2
    """
    try:
        raw.decode()
    except UnicodeDecodeError:
        return len(raw) - len(raw.decode(errors="ignore").encode())
    return 0
