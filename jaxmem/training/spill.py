"""Long documents that can only be read whole, kept in a temporary file that disappears with the process."""

import os
import tempfile
import weakref
from collections.abc import Hashable


class Spill:
    """Bytes by key, in one file without a name in the folder for temporary files (TMPDIR)."""

    def __init__(self) -> None:
        self._file = None
        self._places: dict[Hashable, tuple[int, int]] = {}

    def keep(self, key: Hashable, raw: bytes) -> None:
        """Writes the bytes of a key.

        Raises:
          ValueError: the disk is full.
        """
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as this lives)
                weakref.finalize(self, self._file.close)
            start = self._file.seek(0, os.SEEK_END)
            self._file.write(raw)
            self._file.flush()
        except OSError as error:
            raise ValueError(
                f"data: needs room in {tempfile.gettempdir()} for the long documents of a file, got "
                f"{len(raw):,} bytes and {error.strerror}; name another folder in TMPDIR"
            ) from error
        self._places[key] = start, len(raw)

    def read(self, key: Hashable, start: int, size: int) -> bytes | None:
        """Some of the bytes of a key, from any thread; None if it was not kept."""
        if key not in self._places:
            return None
        first, length = self._places[key]
        return os.pread(self._file.fileno(), max(min(size, length - start), 0), first + start)
