"""Data files of a table that know their names, so that none is read in the place of another.

Checksums of chunks and of the index find bytes that changed, but not whole files that changed places, which a restore by
hand or a file system's repair may leave. TensorStore reads ranges of bytes, so that what stands behind them is free: when the
commit of a file is done, its own name and a checksum are put there. A file without, of a killed commit or an older jaxmem, is
taken for itself.
"""

import contextlib
import os
import re
import zlib
from collections.abc import Iterable
from pathlib import Path

from jaxmem.checkpoints.reading import CheckpointError

_NAME = re.compile(r"[0-9a-f]{32}")
_MARK = b"\njaxmem "
_BYTES = len(_MARK) + 32 + 4
SUFFIX_BYTES = _BYTES
"""Behind each file."""


class NamedFiles:
    """The files of one directory; each is looked at once."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._known: set[str] = set()
        self._unnamed: set[str] = set()

    def check(self) -> None:
        """Looks at the files that are new since the last call.

        Raises: CheckpointError for one that has another's contents.
        """
        for name in self.new():
            written = self._written_name(name)
            if written not in (None, name):
                raise CheckpointError(
                    f"table {self._directory.parent} is damaged: needs {self._directory.name}/{name} as written, "
                    f"got the contents of {written}; rename the files back, or copy the directory back from elsewhere"
                )
            self._known.add(name)
            if written is None:
                self._unnamed.add(name)

    def new(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self._directory) as files:
            return sorted(file.name for file in files if file.name not in self._known and _NAME.fullmatch(file.name))
        return []

    def name_new(self) -> None:
        """Writes the names of the files of a commit that is done; a disk without room for them leaves them without."""
        self._known.update(new := self.new())
        self._unnamed.update(new)
        for name in sorted(self._unnamed):
            with contextlib.suppress(OSError):
                if self._written_name(name) is None:
                    with open(self._directory / name, "ab") as file:
                        file.write(_suffix(name))
                self._unnamed.discard(name)

    def remove_new(self) -> None:
        """Deletes what a commit that failed has left."""
        self.remove(self.new())

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._directory / name)
            self._known.discard(name)
            self._unnamed.discard(name)

    def _written_name(self, name: str) -> str | None:
        with contextlib.suppress(FileNotFoundError), open(self._directory / name, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _BYTES))
            suffix = file.read(_BYTES)
            found = suffix[len(_MARK) : -4].decode("ascii", "replace")
            return found if suffix == _suffix(found) else None
        return None


def _suffix(name: str) -> bytes:
    text = _MARK + name.encode("ascii", "replace")
    return text + zlib.crc32(text).to_bytes(4, "little")
