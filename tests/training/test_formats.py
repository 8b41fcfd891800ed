"""Pieces of JSON strings are found without parsing their lines; what is not text is known by its content."""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import pickle
import random
import sqlite3
import zlib

import numpy as np
import pytest

from jaxmem.training import json_text
from jaxmem.training.data import DataConfig, training_pieces
from jaxmem.training.formats import ArrayRecords
from jaxmem.training.not_text import not_text

TEXT = 'He said: "caf\u00e9"\\path/\n\t\u2028 \U0001f600\x07 end ' * 3


def read(path, context_tokens=16):
    pieces = training_pieces(DataConfig((str(path),), heldout_fraction=0.0, context_tokens=context_tokens))
    return [pieces[i] for i in range(len(pieces))]


WRITERS = {
    "as they are": lambda text: json.dumps(text, ensure_ascii=False),
    "escaped": json.dumps,
    "capital hex": lambda text: json.dumps(text).replace("\\u00e9", "\\u00E9"),
    "solidus": lambda text: json.dumps(text).replace("/", "\\/"),
    "everything": lambda text: '"' + "".join(f"\\u{unit:04x}" for unit in _utf16(text)) + '"',
}


def _utf16(text):
    return np.frombuffer(text.encode("utf-16-le", "surrogatepass"), "<u2").tolist()


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    "line",
    ['{{"text": {}}}', ' {{ "a" : [1, {{"text": "no"}}], "text":{} , "z": "\\n"}} ', '{{"text": 5, "text": {}}}'],
)
def test_pieces_of_a_json_string(tmp_path, writer, line):
    (tmp_path / "a.jsonl").write_text(line.format(WRITERS[writer](TEXT)) + "\n")
    found = read(tmp_path)
    assert b"".join(found).decode() == TEXT
    assert all(12 < len(piece) <= 16 for piece in found[:-1])


def test_undecodable_bytes_and_lone_surrogates_in_json(tmp_path):
    raw = (
        b'{"x\\u00e9": "caf\xe9", "text": "a\\n' + b"\xff\xfe" + rb"\ud800 \u00e9" + b'\xe2\x82 long enough to be cut"}'
    )
    (tmp_path / "a.jsonl").write_bytes(raw)
    assert b"".join(read(tmp_path)).decode() == "a\n" + "\ufffd" * 5 + " é\ufffd long enough to be cut"


def test_a_line_is_parsed_once(tmp_path, monkeypatch):
    """However many pieces it has and in whatever order they are read; and no part that is read is longer than a piece."""
    numbers = random.Random(0)
    texts = ["".join(numbers.choices('ab\u00e9"\n', k=20_000)) for _ in range(4)]
    for name, ascii in (("a", True), ("b", False)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": t}, ensure_ascii=ascii) for t in texts))
    parsed, scanned = [], []
    loads, scan = json.loads, json_text.scanstring
    monkeypatch.setattr(json_text.json, "loads", lambda text: parsed.append(len(text)) or loads(text))
    pieces = training_pieces(DataConfig((str(tmp_path),), heldout_fraction=0.0, context_tokens=64))
    assert len(parsed) == 8 and len(pieces) > 1000
    monkeypatch.setattr(json_text, "scanstring", lambda text, at: scanned.append(len(text)) or scan(text, at))
    order = list(range(len(pieces)))
    numbers.shuffle(order)
    found = {i: pieces[i] for i in order}
    assert b"".join(found[i] for i in range(len(pieces))).decode() == "".join(2 * texts)
    assert len(parsed) == 8 and max(scanned) <= 64 * 6 + 1


def test_a_long_record_is_read_once(tmp_path, monkeypatch):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    texts = [f"{i}" * 5000 for i in range(3)]
    for text in texts:
        writer.write(json.dumps({"text": text}).encode())
    writer.close()
    reads, read_records = [], ArrayRecords._read
    monkeypatch.setattr(ArrayRecords, "LONG_BYTES", 1000)
    monkeypatch.setattr(ArrayRecords, "_read", lambda self, *a: reads.append(a) or read_records(self, *a))
    assert b"".join(read(tmp_path, 64)).decode() == "".join(texts)
    assert len(reads) == 1


def _zip():
    file = io.BytesIO()
    np.savez(file, a=np.arange(100))
    return file.getvalue()


def _sqlite(folder):
    path = folder / "x.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("create table t (a text)")
    raw = path.read_bytes()
    path.unlink()
    return raw


PNG = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + bytes(13) + zlib.compress(bytes(range(256)) * 4)
NOT_TEXT = {
    "gz": (lambda _: gzip.compress(TEXT.encode() * 9), "gzip data"),
    "bz2": (lambda _: bz2.compress(TEXT.encode() * 9), "bzip2 data"),
    "xz": (lambda _: lzma.compress(TEXT.encode() * 9), "xz data"),
    "zst": (lambda _: b"\x28\xb5\x2f\xfd" + os.urandom(50), "zstd data"),
    "npz": (lambda _: _zip(), "a zip archive"),
    "npy": (lambda _: b"\x93NUMPY\x01\x00" + b"{'descr': '<i8'}".ljust(118) + bytes(80), "a NumPy array"),
    "png": (lambda _: PNG, "an image"),
    "jpg": (lambda _: b"\xff\xd8\xff\xe0\x00\x10JFIF\x00" + os.urandom(400), "an image"),
    "pdf": (lambda _: b"%PDF-1.4\n" + b"1 0 obj << >> endobj\n" * 30, "a PDF"),
    "parquet": (lambda _: b"PAR1\x15\x04\x15\x10\x15\x14" + TEXT.encode() * 50 + b"\x00\x01PAR1", "a Parquet file"),
    "arrow": (lambda _: b"ARROW1\x00\x00\xff\xff\xff\xff" + bytes(40), "an Arrow file"),
    "pkl": (lambda _: pickle.dumps([TEXT] * 3), "a pickle"),
    "sqlite": (_sqlite, "a SQLite database"),
    "safetensors": (
        lambda _: (60).to_bytes(8, "little") + b'{"a": {"dtype": "F32"}}'.ljust(60) + b"A" * 9000,
        "a safetensors",
    ),
    "elf": (lambda _: b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00\x3e\x00" * 20, "a program"),
    "tar": (lambda _: b"a.txt".ljust(257, b"\0") + b"ustar\x0000" + bytes(248) + TEXT.encode(), "a tar archive"),
    "bin": (lambda _: np.arange(500, dtype="<i4").tobytes(), "binary data"),
    "random": (lambda _: random.Random(0).randbytes(3000), "not UTF-8|binary data"),
    "late": (lambda _: b"a header of text\n" * 6000 + random.Random(0).randbytes(300_000), "not UTF-8|binary data"),
    "utf16": (lambda _: TEXT.encode("utf-16"), "UTF-16 text"),
    "cp1251": (lambda _: ("\u043f\u0440\u0438\u0432\u0435\u0442 " * 9).encode("cp1251"), "not UTF-8"),
}


@pytest.mark.parametrize("kind", NOT_TEXT)
@pytest.mark.parametrize("name", ["data.txt", "data.jsonl"])
def test_what_is_not_text_is_refused_or_left_out(tmp_path, kind, name):
    make, what = NOT_TEXT[kind]
    (tmp_path / name).write_bytes(make(tmp_path))
    with pytest.raises(
        ValueError, match=rf"needs UTF-8 text, .jsonl or .array_record, got .*{name}', which is .*({what})"
    ):
        read(tmp_path / name)
    with pytest.raises(
        ValueError, match=rf"at least one document with text, got 0 doc.*1 not text \({name}: .*({what})"
    ):
        read(tmp_path)
    (tmp_path / "good.txt").write_text("good")
    assert read(tmp_path) == [b"good"]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"a",
        b"caf\xe9 \xff\xfe",
        "h\u00e9las, \u00e7a va \u00e0 No\u00ebl. ".encode("latin-1") * 99,
        b"BM is a bank",
        b"MZ, ORC and ID3",
        b"PK and PAR1 are how files begin",
        b"RIFF: a short figure",
        b"GIF89a is a format of images",
        b"one NUL \x00 here" + b"." * 999,
        TEXT.encode() * 3000,
        "\U0001f600".encode() * 50_000,
        b"\x1b[31mred\x1b[0m\r\n" * 20,
        "\ufefftext".encode(),
        "\u65e5\u672c".encode() * 60_000,
    ],
)
def test_text_is_text(tmp_path, raw):
    (tmp_path / "a").write_bytes(raw)
    assert not_text(str(tmp_path / "a")) is None


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.array_record", "a.arrayrecord"])
def test_a_pipe_is_reported_whatever_it_is_called(tmp_path, name):
    os.mkfifo(tmp_path / name)
    (tmp_path / "good.txt").write_text("good")
    pieces = training_pieces(DataConfig((str(tmp_path),), heldout_fraction=0.0))
    assert len(pieces) == 1 and f"1 unreadable ({name}: not a regular file)" in str(pieces.report)
    with pytest.raises(ValueError, match=rf"at least one document .*{name}: not a regular file"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_that_becomes_a_pipe_does_not_hang_a_read(tmp_path, name):
    (tmp_path / name).write_text('{"text": "long enough"}')
    (tmp_path / "z.txt").write_text("stays")
    pieces = training_pieces(DataConfig((str(tmp_path),), heldout_fraction=0.0))
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    assert [pieces[0], pieces[1]] == [b"", b"stays"] and f"{name}: not a regular file" in str(pieces.report)
