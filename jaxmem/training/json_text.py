r"""A JSON string as a document whose pieces are found again without parsing: each is a part of the string as it is written.

Texts in JSON are written with escapes, so a place in a text is not a place in the file. Nearly all files are written in
one of two ways, with the letters beyond ASCII as they are or as \uXXXX; then the lengths of what was read, written again,
are the places. For all others the string is walked through, escape by escape, once.
"""

import codecs
import io
import json
import re
from collections.abc import Iterable, Iterator
from json.decoder import JSONDecoder, scanstring

_ESCAPE = re.compile(rb"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|\\u....|\\.")
"""A pair of surrogates is one character."""
_SPACE = re.compile(r"[ \t\r\n]*")


def json_object(raw: bytes) -> dict | None:
    """The JSON object that a line or a record is, or None; `RecursionError` is what absurd nesting raises."""
    if not raw.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        return None
    try:
        return json.loads(raw.removeprefix(codecs.BOM_UTF8).decode(errors="replace"))
    except (ValueError, RecursionError):
        return None


def unescape(written: bytes) -> bytes:
    r"""The text of a part of a JSON string; undecodable bytes stay, a lone surrogate becomes some.

    >>> unescape(rb"caf\u00e9 \ud83d\ude00\n").decode()
    'café 😀\n'
    """
    if b"\\" not in written:
        return written
    try:
        return _scan(written)
    except ValueError:
        return _ESCAPE.sub(lambda escape: _scan(escape[0]), written)


def _scan(written: bytes) -> bytes:
    """Raises ValueError for what is not UTF-8 or no JSON."""
    return scanstring(written.decode() + '"', 0)[0].encode("utf-8", "surrogatepass")


class JsonText(io.BytesIO):
    """The text of a field of a JSON object, as a stream.

    Args:
      line: the object as it is written.
      field: name of the field.
      text: what a parser found in it; it was given the line with U+FFFD for undecodable bytes.
    """

    def __init__(self, line: bytes, field: str, text: str) -> None:
        for self._ascii in (False, True):
            written = self._write(text)
            if (quote := line.find(b'"' + written + b'"')) >= 0:  # any string of the line that says this will do
                self._written, self._start = written, quote + 1
                break
        else:
            self._ascii = None
            self._start, end = _span(line, field)
            self._written = line[self._start : end]
        self._has_escapes = b"\\" in self._written
        super().__init__(unescape(self._written))

    def places(self, pieces: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, int, bytes]]:
        """Of pieces (start, bytes) in order: the start in the line and the size of the part of the string; the bytes."""
        at = 0
        for _, raw in pieces:
            if not self._has_escapes:
                size = len(raw)
            elif self._ascii is None:
                size = written_bytes(self._written, at, len(raw))
            else:
                size = len(self._write(raw.decode("utf-8", "surrogatepass")))
            yield self._start + at, size, raw
            at += size

    def _write(self, text: str) -> bytes:
        return json.dumps(text, ensure_ascii=self._ascii)[1:-1].encode("utf-8", "surrogatepass")


def written_bytes(written: bytes, at: int, n_bytes: int) -> int:
    r"""How many bytes of a JSON string, from a place that is not inside an escape, stand for so many bytes of text.

    >>> written_bytes(rb"caf\u00e9 \n", at=1, n_bytes=4), written_bytes(b"abc", 0, 2)
    (8, 2)
    """
    place = at
    while n_bytes > 0:
        escape = _ESCAPE.search(written, place)
        as_it_is = min((escape.start() if escape else len(written)) - place, n_bytes)
        place, n_bytes = place + as_it_is, n_bytes - as_it_is
        if n_bytes > 0:
            n_bytes -= len(_scan(escape[0]))
            place = escape.end()
    return place - at


def _span(line: bytes, field: str) -> tuple[int, int]:
    """Where the string of the last field of this name begins and ends, quotes not counted, in a line that is an object.

    Read as Latin-1, bytes are letters, and JSON's own signs are the same.
    """
    text, scan, found = line.decode("latin-1"), JSONDecoder().scan_once, (0, 0)
    at = text.index("{") + 1
    name = field.encode("utf-8", "surrogatepass")
    skip = lambda place: _SPACE.match(text, place).end()
    while text[at := skip(at)] != "}":
        key_end = scanstring(text, at + 1)[1]
        key = text[at + 1 : key_end - 1].encode("latin-1")
        value = skip(text.index(":", key_end) + 1)
        value_end = scan(text, value)[1]
        if text[value] == '"' and unescape(key) == name:
            found = value + 1, value_end - 1
        at = skip(value_end)
        at += text[at] == ","
    return found
