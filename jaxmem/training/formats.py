"""Documents in files: a text file, a line of JSONL, or a record of ArrayRecord is one.

A document is found once, when the index is made, and read again by its position, a piece at a time. Its bytes are as
they are in the file; decoding them is up to the reader.
"""

import codecs
import io
import json
import os
import stat
from collections.abc import Iterator, Sequence
from io import BufferedIOBase
from typing import Any, Protocol, runtime_checkable

from jaxmem.training.sources import DataReport, SourceFile


@runtime_checkable
class Format(Protocol):
    """How the documents of one kind of file are found and read. Both methods raise OSError."""

    def scan(self, file: SourceFile, report: DataReport) -> Iterator[tuple[int, BufferedIOBase]]:
        """All documents in order: where each one is, and its bytes. What is no document goes into the report."""
        ...

    def open(self, path: str, position: int) -> BufferedIOBase:
        """The document at a position that `scan` gave."""
        ...


class TextFile:
    """A file is one document."""

    def scan(self, file: SourceFile, report: DataReport) -> Iterator[tuple[int, BufferedIOBase]]:
        """The file itself, at position 0."""
        with self.open(file.path, 0) as stream:
            yield 0, stream

    def open(self, path: str, position: int) -> BufferedIOBase:
        """The file; a pipe or a device, whose reading might never end, is refused."""
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("not a regular file")
        return open(path, "rb")


class JsonLines:
    """A line is a JSON object whose `field` is a document; positions are byte offsets of lines."""

    def __init__(self, field: str) -> None:
        self._field = field

    def scan(self, file: SourceFile, report: DataReport) -> Iterator[tuple[int, BufferedIOBase]]:
        """Every line but blank ones."""
        position = 0
        with TextFile().open(file.path, 0) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    report.undecodable_bytes += undecodable_bytes(line)
                    try:
                        document = self._parse(line)
                    except OSError as error:
                        report.unreadable_because(f"{file.name}:{number}", error)
                    else:
                        yield position, document
                position += len(line)

    def open(self, path: str, position: int) -> BufferedIOBase:
        """The text of the line at a byte offset."""
        with open(path, "rb") as lines:
            lines.seek(position)
            return self._parse(lines.readline())

    def _parse(self, line: bytes) -> BufferedIOBase:
        record = _json_object(line)
        if record is None:
            raise OSError("not a JSON object")
        text = record.get(self._field)
        if not isinstance(text, str):
            raise OSError(f"no text in field {self._field!r}")
        return _stream(text)


class ArrayRecords:
    """A record is a document: the `field` of a JSON object, or else text as it is; positions are record numbers."""

    BLOCK_RECORDS = 64

    def __init__(self, field: str) -> None:
        self._field = field
        self._readers: dict[str, Any] = {}

    def scan(self, file: SourceFile, report: DataReport) -> Iterator[tuple[int, BufferedIOBase]]:
        """Every record, read in blocks."""
        count = self._reader(file.path).num_records()
        for first in range(0, count, self.BLOCK_RECORDS):
            yield from self._block(file, range(first, min(first + self.BLOCK_RECORDS, count)), report)

    def open(self, path: str, position: int) -> BufferedIOBase:
        """The text of the record with a number."""
        return self._read(path, [position])[0]

    def _block(self, file: SourceFile, positions: range, report: DataReport) -> Iterator[tuple[int, BufferedIOBase]]:
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

    def _read(self, path: str, positions: Sequence[int]) -> list[BufferedIOBase]:
        try:
            records = self._reader(path).read(list(positions))
        except RuntimeError as error:
            raise OSError(str(error)) from error
        texts = [(_json_object(record) or {}).get(self._field) for record in records]
        return [_stream(text if isinstance(text, str) else record) for text, record in zip(texts, records)]

    def _reader(self, path: str) -> Any:
        """An open reader, kept: opening one costs twenty times as much as reading a record."""
        if path not in self._readers:
            from array_record.python import array_record_module

            os.stat(path)
            reader = array_record_module.ArrayRecordReader(path)
            if not reader.ok():
                raise OSError("not a complete ArrayRecord file")
            self._readers[path] = reader
        return self._readers[path]


class Formats:
    """What reads a path, by its extension: .jsonl, .array_record or .arrayrecord, and text for all others."""

    def __init__(self, field: str) -> None:
        self._text, records = TextFile(), ArrayRecords(field)
        self._of_records = {".jsonl": JsonLines(field), ".array_record": records, ".arrayrecord": records}

    def __call__(self, path: str) -> Format:
        """The format of a path."""
        return self._of_records.get(_extension(path), self._text)

    def has_records(self, path: str) -> bool:
        """Whether a file holds many documents."""
        return _extension(path) in self._of_records


def _extension(path: str) -> str:
    return os.path.splitext(path)[1].lower()


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


def _json_object(raw: bytes) -> dict | None:
    """The JSON object that a line or a record is, or None; `RecursionError` is what absurd nesting raises."""
    if not raw.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        return None
    try:
        return json.loads(raw.removeprefix(codecs.BOM_UTF8).decode(errors="replace"))
    except (ValueError, RecursionError):
        return None


def _stream(text: str | bytes) -> BufferedIOBase:
    """A text as a file; a lone surrogate, which JSON can write, becomes undecodable bytes."""
    return io.BytesIO(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
