"""Documents cut into pieces with random access: what is shuffled, tokenised and packed.

Pieces have a bounded size, so that a global shuffle moves paragraphs rather than books, and are never cut inside a
character, so that decoding each on its own gives the text of the whole. Indexing reads every file once, in bounded
memory, and keeps 48 bytes per piece, a digest of its text among them: what is read later is the text that was indexed, or
else it is left out and counted.
"""

import functools
import hashlib
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from io import BufferedIOBase

import numpy as np
from jaxtyping import Bool, Int

from jaxmem.models.tokenizer import replace_undecodable
from jaxmem.training.formats import Format, Formats, undecodable_bytes
from jaxmem.training.not_text import not_text
from jaxmem.training.sources import DataReport, SourceFile

COLUMNS = FILE, POSITION, START, SIZE, TEXT_BYTES, DIGEST = range(6)
GOLDEN_RATIO = 0.6180339887498949


class Pieces:
    """A sequence of texts: `pieces[i]` is valid UTF-8, of at most the size it was cut to before undecodable bytes grew.

    A piece that cannot be read any more, or whose text is another now, is empty and counted. Only when a whole pass of
    reads in a row has failed does reading raise OSError: the data are gone, and a run without any would never end.

    Args:
      files: where documents are, by number.
      format_of: what reads a path.
      index: per piece its file number, the position of its document there, its start and size there, the bytes of its
        text when undecodable ones are replaced, and the digest of what is in the file.
      report: what indexing found; failed reads are added to it.
    """

    def __init__(
        self,
        files: Sequence[SourceFile],
        format_of: Callable[[str], Format],
        index: Int[np.ndarray, "pieces columns"],
        report: DataReport,
    ) -> None:
        self.report, self.index = report, index
        self._files, self._format_of = files, format_of
        self._failures_in_a_row = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, piece: int) -> bytes:
        number, position, start, size, _, digest = self.index[piece].tolist()
        file = self._files[number]
        try:
            raw = self._format_of(file.path).read(file.path, position, start, size)
            if _digest(raw) != digest:
                raise OSError("its text changed after the run had begun")
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

    def name(self, piece: int) -> str:
        """Of the file that a piece is in."""
        return self._files[self.index[piece, FILE]].name

    def by_file(self) -> list[tuple[str, bytes]]:
        """Name and text of every file that has pieces here: all its pieces, joined."""
        texts: dict[int, list[bytes]] = {}
        for piece, number in enumerate(self.index[:, FILE].tolist()):
            texts.setdefault(number, []).append(self[piece])
        return [(self._files[number].name, b"".join(parts)) for number, parts in texts.items()]

    def limit(self, max_bytes: int | None) -> "Pieces":
        """Some of the pieces, spread evenly, in order, of at most max_bytes together (but one at least); None: all."""
        sizes = self.index[:, TEXT_BYTES]
        if max_bytes is None or sizes.sum() <= max_bytes:
            return self
        spread = np.argsort(np.arange(len(self)) * GOLDEN_RATIO % 1.0, kind="stable")
        n_pieces = max(1, np.searchsorted(np.cumsum(sizes[spread]), max_bytes, side="right"))
        return Pieces(self._files, self._format_of, self.index[np.sort(spread[:n_pieces])], self.report)

    def divide(self, chosen: Bool[np.ndarray, "pieces"]) -> tuple["Pieces", "Pieces"]:
        """The other pieces, with this report's faults, and the chosen ones; each with its own counts."""
        parts = [self.index[~chosen], self.index[chosen]]
        (files, documents), (files_chosen, documents_chosen) = [_counts(index) for index in parts]
        files_before, documents_before = _counts(self.index)
        report = self.report
        report.files += files - files_before
        report.documents += documents - documents_before
        of_chosen = DataReport(files=files_chosen, documents=documents_chosen)
        for index, counts in zip(parts, (report, of_chosen)):
            counts.pieces, counts.bytes = len(index), int(index[:, TEXT_BYTES].sum())
        return tuple(Pieces(self._files, self._format_of, *part) for part in zip(parts, (report, of_chosen)))

    def cut_in_two(self, piece: int, n_bytes: int) -> "Pieces":
        """The same text, one piece being two: the first of at most so many bytes, 0 < n_bytes < its size, and at least
        a character; or as it is, if the piece is a single one.
        """
        number, position, start, size, _, _ = self.index[piece].tolist()
        path = self._files[number].path
        format = self._format_of(path)
        raw = format.read(path, position, start, size)
        ends = [end for end in range(1, len(raw)) if raw[end] & 0xC0 != 0x80]
        if not ends:
            return self
        end = max((end for end in ends if end <= n_bytes), default=ends[0])
        first = format.size_of(path, position, start, size, end)
        rows = [
            (number, position, start, first, len(replace_undecodable(raw[:end])), _digest(raw[:end])),
            (number, position, start + first, size - first, len(replace_undecodable(raw[end:])), _digest(raw[end:])),
        ]
        self.report.pieces += 1
        index = np.concatenate([self.index[:piece], np.array(rows, np.int64), self.index[piece + 1 :]])
        return Pieces(self._files, self._format_of, index, self.report)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes when texts, names of files, or their order do: an iterator's state means nothing on other pieces."""
        numbers, compact = np.unique(self.index[:, FILE], return_inverse=True)
        index = self.index.astype("<i8")
        index[:, FILE] = compact.reshape(-1)
        digest = hashlib.blake2b(index.tobytes(), digest_size=16)
        digest.update("\n".join(self._files[n].name for n in numbers).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def index_pieces(
    files: Sequence[SourceFile],
    formats: Formats,
    piece_bytes: int,
    report: DataReport,
) -> Pieces:
    """Reads all files once and cuts their documents.

    Args:
      piece_bytes: the most bytes of a piece, at least 4 (a character).
      report: receives counts and faults. What is not text is a fault in a folder or behind a glob.

    Raises:
      ValueError: a file that was named itself is not text.
    """
    columns = array("q")
    for number, file in enumerate(files):
        report.files += 1
        n_found, faults_before = 0, report.unreadable + report.not_text
        try:
            if formats.is_text(file.path) and (found := not_text(file.path)):
                _leave_out(file, *found, report)
                continue
            format_of_file = formats(file.path)
            for n_found, (position, document) in enumerate(format_of_file.scan(file, report), 1):
                pieces_before = len(columns)
                for start, size, raw in format_of_file.places(document, cut(document, piece_bytes)):
                    undecodable = 0 if raw.isascii() else undecodable_bytes(raw)
                    report.undecodable_bytes += undecodable
                    n_bytes = len(replace_undecodable(raw)) if undecodable else len(raw)
                    columns.extend((number, position, start, size, n_bytes, _digest(raw)))
                report.documents += 1
                report.empty += len(columns) == pieces_before
        except OSError as error:
            report.unreadable_because(file.name, error)
        report.empty += n_found == 0 and report.unreadable + report.not_text == faults_before
    index = np.frombuffer(columns, np.int64).reshape(-1, len(COLUMNS))
    report.pieces += len(index)
    report.bytes += int(index[:, TEXT_BYTES].sum())
    return Pieces(files, formats, index, report)


def _leave_out(file: SourceFile, kind: str, advice: str, report: DataReport) -> None:
    advice = f"{advice}, or name other files" if advice else "name other files"
    if file.named:
        raise ValueError(
            f"data: needs UTF-8 text, .jsonl or .array_record, got {file.path!r}, which is {kind}; {advice}"
        )
    report.not_text_because(file.name, kind)


def _digest(raw: bytes) -> int:
    """64 bits of BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little", signed=True)


def _counts(index: Int[np.ndarray, "pieces columns"]) -> tuple[int, int]:
    """Files and documents that have pieces in an index, whose rows are in order."""
    changes = [np.any(np.diff(index[:, columns], axis=0) != 0, axis=1).sum() for columns in ([FILE], [FILE, POSITION])]
    return tuple(int(n) + 1 for n in changes) if len(index) else (0, 0)


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
