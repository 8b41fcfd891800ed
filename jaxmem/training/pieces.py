"""Documents cut into pieces with random access: what is shuffled, tokenised and packed.

Pieces have a bounded size, so that a global shuffle moves paragraphs rather than books, and are never cut inside a
character, so that decoding each on its own gives the text of the whole. Indexing reads every file once, in bounded
memory, and keeps 32 bytes per piece. Reading a piece opens its file and, unless that is plain text, parses its document.
"""

import hashlib
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from io import BufferedIOBase

import numpy as np
from jaxtyping import Int

from jaxmem.models.tokenizer import replace_undecodable
from jaxmem.training.formats import Format, undecodable_bytes
from jaxmem.training.sources import DataReport, SourceFile

FILE, POSITION, START, SIZE = range(4)
GOLDEN_RATIO = 0.6180339887498949


class Pieces:
    """A sequence of texts: `pieces[i]` is valid UTF-8, of at most the size it was cut to before undecodable bytes grew.

    A piece that cannot be read any more is empty and counted. Only when a whole pass of reads in a row has failed does
    reading raise OSError: the data are gone, and a run without any would never end.

    Args:
      files: where documents are, by number.
      format_of: what reads a path.
      index: per piece its file number, the position of its document there, its start in the document, and its bytes.
      report: what indexing found; failed reads are added to it.
    """

    def __init__(
        self,
        files: Sequence[SourceFile],
        format_of: Callable[[str], Format],
        index: Int[np.ndarray, "pieces 4"],
        report: DataReport,
    ) -> None:
        self.report = report
        self._files, self._format_of, self._index = files, format_of, index
        self._failures_in_a_row = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, piece: int) -> bytes:
        number, position, start, size = self._index[piece].tolist()
        file = self._files[number]
        try:
            with self._format_of(file.path).open(file.path, position) as document:
                document.seek(start)
                raw = document.read(size)
            if len(raw) < size:
                raise OSError("the file became shorter")
        except OSError as error:
            self._count_failure(file.name, error)
            return b""
        self._failures_in_a_row = 0
        return replace_undecodable(raw)

    def _count_failure(self, name: str, error: OSError) -> None:
        """Grain reads from several threads."""
        with self._lock:
            self.report.failed_read_because(name, error)
            self._failures_in_a_row += 1
            if self._failures_in_a_row > len(self):
                raise OSError(
                    f"data: needs at least one readable piece in {len(self)}, got {self._failures_in_a_row} failed "
                    f"reads in a row, the last of {name!r} ({error}); bring the files back and resume"
                ) from error

    def by_file(self) -> list[tuple[str, bytes]]:
        """Name and text of every file that has pieces here: all its pieces, joined."""
        texts: dict[int, list[bytes]] = {}
        for piece, number in enumerate(self._index[:, FILE].tolist()):
            texts.setdefault(number, []).append(self[piece])
        return [(self._files[number].name, b"".join(parts)) for number, parts in texts.items()]

    def limit(self, max_bytes: int | None) -> "Pieces":
        """Some of the pieces, spread evenly, in order, of at most max_bytes together (but one at least); None: all."""
        sizes = self._index[:, SIZE]
        if max_bytes is None or sizes.sum() <= max_bytes:
            return self
        spread = np.argsort(np.arange(len(self)) * GOLDEN_RATIO % 1.0, kind="stable")
        n_pieces = max(1, np.searchsorted(np.cumsum(sizes[spread]), max_bytes, side="right"))
        return Pieces(self._files, self._format_of, self._index[np.sort(spread[:n_pieces])], self.report)

    @property
    def fingerprint(self) -> str:
        """Changes when names, order or sizes of the data do: an iterator's state means nothing on other pieces."""
        digest = hashlib.blake2b(self._index.astype("<i8").tobytes(), digest_size=16)
        digest.update("\n".join(file.name for file in self._files).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def index_pieces(
    files: Sequence[SourceFile],
    format_of: Callable[[str], Format],
    piece_bytes: int,
    report: DataReport,
    keep: Callable[[str, int], bool] | None = None,
) -> Pieces:
    """Reads all files once and cuts their documents.

    Args:
      piece_bytes: the most bytes of a piece, at least 4 (a character).
      report: receives counts and faults.
      keep: whether the document at a position of a named file belongs to these pieces; None: all do.
    """
    columns = array("q")
    for number, file in enumerate(files):
        report.files += 1
        n_found, unreadable_before = 0, report.unreadable
        try:
            for n_found, (position, document) in enumerate(format_of(file.path).scan(file, report), 1):
                if keep is None or keep(file.name, position):
                    pieces_before = len(columns)
                    for start, raw in cut(document, piece_bytes):
                        columns.extend((number, position, start, _count(raw, report)))
                    report.documents += 1
                    report.empty += len(columns) == pieces_before
        except OSError as error:
            report.unreadable_because(file.name, error)
        report.empty += n_found == 0 and report.unreadable == unreadable_before
    index = np.frombuffer(columns, np.int64).reshape(-1, 4)
    report.pieces += len(index)
    return Pieces(files, format_of, index, report)


def _count(raw: bytes, report: DataReport) -> int:
    """The size of a piece, after its text has gone into the report."""
    undecodable = undecodable_bytes(raw)
    report.undecodable_bytes += undecodable
    report.bytes += len(replace_undecodable(raw)) if undecodable else len(raw)
    return len(raw)


def cut(stream: BufferedIOBase, piece_bytes: int) -> Iterator[tuple[int, bytes]]:
    r"""Start and bytes of the pieces of a document; together they are the document.

    >>> import io
    >>> [raw.decode() for _, raw in cut(io.BytesIO("abcdé".encode()), 5)]
    ['abcd', 'é']
    """
    start, rest = 0, b""
    while True:
        raw = rest + stream.read(piece_bytes + 1 - len(rest))
        end = _character_boundary(raw, piece_bytes) if len(raw) > piece_bytes else len(raw)
        if not raw:
            return
        yield start, raw[:end]
        start, rest = start + end, raw[end:]


def _character_boundary(raw: bytes, limit: int) -> int:
    """The last place up to `limit` that is not inside a character; bytes 10xxxxxx continue one, three at the most."""
    for end in range(limit, max(limit - 4, 0), -1):
        if raw[end] & 0xC0 != 0x80:
            return end
    return limit
