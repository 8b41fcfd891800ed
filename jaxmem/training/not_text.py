"""Tells files that are not UTF-8 text from those that are, by what is in them and not by what they are called.

A model that is trained on compressed or binary data learns nothing and says nothing, so such files are left out.
Three samples of a file are looked at: its beginning, middle and end.
"""

import os
import re
from io import BufferedReader

from jaxmem.training.formats import open_regular, undecodable_bytes

HEAD_BYTES, SAMPLE_BYTES = 1 << 16, 1 << 14
UNDECODABLE_SHARE = 0.3
"""More than the accents of any language in a one-byte encoding; data that was compressed has about a half."""
CONTROL_SHARE = 0.05
LEAST_BYTES = 32
"""Shares of less mean nothing."""

_DECOMPRESS, _EXTRACT = "decompress it", "extract the text from it"
_CONTROLS = bytes({*range(32), 127} - set(b"\t\n\v\f\r\b\x1b"))
_KINDS = [
    (rb"\x1f\x8b|\x1f\x9d", "gzip data", _DECOMPRESS),
    (rb"BZh[1-9]1AY&SY", "bzip2 data", _DECOMPRESS),
    (rb"\xfd7zXZ\x00", "xz data", _DECOMPRESS),
    (rb"\x5d\x00\x00", "lzma data", _DECOMPRESS),
    (rb"[\x22-\x28]\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", "zstd data", _DECOMPRESS),
    (rb"\x04\x22\x4d\x18", "lz4 data", _DECOMPRESS),
    (rb"PK(\x03\x04|\x05\x06|\x07\x08)", "a zip archive (.zip, .npz, .docx, .pt, ...)", _EXTRACT),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", _EXTRACT),
    (rb"Rar!\x1a\x07", "a rar archive", _EXTRACT),
    (rb"(?s).{257}ustar", "a tar archive", _EXTRACT),
    (rb"%PDF-", "a PDF", _EXTRACT),
    (rb"PAR1", "a Parquet file", "write its texts as JSON lines"),
    (rb"ARROW1|FEA1|\xff\xff\xff\xff.{2}\x00\x00", "an Arrow file", "write its texts as JSON lines"),
    (rb"Obj\x01", "an Avro file", "write its texts as JSON lines"),
    (rb"ORC", "an ORC file", "write its texts as JSON lines"),
    (rb"SQLite format 3\x00", "a SQLite database", "write its texts as JSON lines"),
    (rb"\x93NUMPY", "a NumPy array", _EXTRACT),
    (rb"\x89HDF", "an HDF5 file", _EXTRACT),
    (rb"\x80[\x02-\x05]", "a pickle", _EXTRACT),
    (rb".{2,6}\x00{2,6}\{", "a safetensors file", ""),
    (rb"GGUF|GGML", "model weights", ""),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF.{4}WEBP|BM|II\*\x00|MM\x00\*", "an image", ""),
    (rb"ID3|OggS|fLaC|RIFF|.{4}ftyp|\x1aE\xdf\xa3|\xff[\xfb\xf3\xf2]", "sound or film", ""),
    (rb"\x7fELF|MZ|\xca\xfe\xba\xbe|[\xfe\xcf\xce]\xed\xfa|\x00asm|!<arch>", "a program or library", ""),
]
"""How files begin, what they are, and what to do about it.

A beginning alone convicts no file whose first bytes are all of text, and one of two or three letters none that is text."""
_WIDE = [
    (b"\xff\xfe\x00\x00", "UTF-32"), (b"\x00\x00\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"),
]  # fmt: skip


def not_text(path: str) -> tuple[str, str] | None:
    """(what a file is, what to do) if it is not text; None if it is, or has nothing in it.

    Raises:
      OSError: it cannot be read, or is no regular file.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(HEAD_BYTES)
        samples = [head, *(_sample(file, at) for at in (size // 2, size - SAMPLE_BYTES) if at > HEAD_BYTES)]
    for mark, encoding in _WIDE:
        if head.startswith(mark) and len(head) % 2 == 0 and len(head) > len(mark):
            return f"{encoding} text", f"convert it with iconv -f {encoding} -t UTF-8"
    reason = next(filter(None, map(_binary, samples)), None)
    if reason is None and not (head.startswith(b"%PDF-") or _has_binary_bytes(head[:512])):
        return None
    for pattern, kind, advice in _KINDS:
        mark = re.match(pattern, head, re.DOTALL)
        if mark and (reason or len(mark[0]) >= 4 or not re.match(rb"[\t -~]", mark[0])):
            return kind, advice
    return None if reason is None else (reason, "convert it to UTF-8 text")


def _sample(file: BufferedReader, at: int) -> bytes:
    """Some bytes from a place on, which may be inside a character."""
    file.seek(at)
    return file.read(SAMPLE_BYTES).lstrip(bytes(range(0x80, 0xC0)))


def _has_binary_bytes(raw: bytes) -> bool:
    """Whether there is anything that a text would hardly hold."""
    return len(raw.translate(None, _CONTROLS)) < len(raw) or undecodable_bytes(raw) > 3  # the last character may be cut


def _binary(raw: bytes) -> str | None:
    """Why a sample is not text, if it is not."""
    n_nul = raw.count(0)
    if raw[:64].count(0) >= 3 or (n_nul >= 2 and n_nul >= len(raw) * CONTROL_SHARE / 10):
        return "binary data (NUL bytes)"
    if len(raw) < LEAST_BYTES:
        return None
    if len(raw) - len(raw.translate(None, _CONTROLS)) >= len(raw) * CONTROL_SHARE:
        return "binary data (control characters)"
    share = undecodable_bytes(raw) / len(raw)
    return f"not UTF-8 ({share:.0%} undecodable)" if share > UNDECODABLE_SHARE else None
