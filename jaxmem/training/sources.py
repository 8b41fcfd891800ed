"""Which files are read, and a report of what is wrong with them.

Nothing that is wrong with a file stops a run: it is counted in a `DataReport`. Only a path that names nothing is an
error, at the start.
"""

import dataclasses
import fnmatch
import glob
import hashlib
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

NAMES_IN_REPORT = 5


@dataclasses.dataclass
class DataReport:
    """What was read, and what was wrong with it; `str` gives one line."""

    files: int = 0
    documents: int = 0
    bytes: int = 0
    """Of text, after undecodable bytes became U+FFFD."""
    pieces: int = 0
    empty: int = 0
    """Files and documents without any text."""
    unreadable: int = 0
    """Files, folders, lines and records that could not be read when the index was made."""
    undecodable_bytes: int = 0
    failed_reads: int = 0
    """Pieces that could not be read any more later, in the middle of a run."""
    examples: list[str] = dataclasses.field(default_factory=list)
    """The first few of what was unreadable, with the reason."""

    def unreadable_because(self, name: str, reason: object) -> None:
        """Counts something that the index could not read."""
        self.unreadable += 1
        self._remember(name, reason)

    def failed_read_because(self, name: str, reason: object) -> None:
        """Counts a piece that disappeared after the index was made."""
        self.failed_reads += 1
        self._remember(name, reason)

    def _remember(self, name: str, reason: object) -> None:
        if len(self.examples) < NAMES_IN_REPORT:
            self.examples.append(f"{name}: {getattr(reason, 'strerror', None) or reason}")

    def __str__(self) -> str:
        line = f"{self.documents:,} documents in {self.files:,} files, {self.bytes:,} bytes in {self.pieces:,} pieces"
        for count, what in (
            (self.empty, "empty"),
            (self.undecodable_bytes, "undecodable bytes"),
            (self.unreadable, "unreadable"),
            (self.failed_reads, "failed reads"),
        ):
            line += f", {count:,} {what}" if count else ""
        return line + (f" ({'; '.join(self.examples)})" if self.examples else "")


class SourceFile(NamedTuple):
    """A file and what it is called wherever the data lies."""

    name: str
    """Path relative to the folder that was asked for, with "/"."""
    path: str


def find_files(what: str, patterns: Sequence[str], exclude: Sequence[str], report: DataReport) -> list[SourceFile]:
    """The files that folders, files and globs name, each once, hidden ones left out.

    Args:
      what: name of the patterns, for messages.
      patterns: folders (everything below them), files, or globs with `**`; a glob names files, not folders. Files of
        one pattern come sorted by name.
      exclude: as in .gitignore, a pattern without "/" is matched against every part of a name, one with "/" against
        its beginning; `*` crosses "/".
      report: receives folders that cannot be listed.

    Raises:
      ValueError: a pattern that names nothing, or nothing but what is excluded.
    """
    found: dict[str, SourceFile] = {}
    for pattern in patterns:
        if glob.has_magic(pattern):
            root, names = _glob(os.path.expanduser(pattern))
        else:
            root, names = _walk(what, os.path.expanduser(pattern), exclude, report)
        kept = [name for name in sorted(names) if not _excluded(name, exclude)]
        if not kept:
            excluded = f" ({len(names)} excluded)" if names else ""
            raise ValueError(
                f"{what} data: needs at least one file, got {what}={pattern!r} with none{excluded}; put text, .jsonl "
                "or .array_record files there, or name another folder, file or glob"
            )
        for name in kept:
            path = os.path.join(root, name)
            found.setdefault(os.path.realpath(path), SourceFile(name, path))
    return list(found.values())


def _glob(pattern: str) -> tuple[str, list[str]]:
    """Files that match, relative to the folder before the first wildcard."""
    parts = pathlib.PurePath(pattern).parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root = os.path.join("", *parts[:first])
    names = glob.glob(os.path.join(*parts[first:]), root_dir=root or None, recursive=True)
    return root, [_posix(name) for name in names if not os.path.isdir(os.path.join(root, name))]


def _walk(what: str, path: str, exclude: Sequence[str], report: DataReport) -> tuple[str, list[str]]:
    """A file, or all files below a folder; excluded folders are not entered."""
    if not os.path.lexists(path):
        raise ValueError(
            f"{what} data: needs an existing folder, file or glob, got {what}={path!r}, which does not exist; "
            "correct the path"
        )
    if not os.path.isdir(path):
        return os.path.split(path)[0], [os.path.basename(path)]
    names = []
    for folder, folders, files in os.walk(path, onerror=lambda error: report.unreadable_because(error.filename, error)):
        inside = _posix(os.path.relpath(folder, path)).removeprefix(".")
        prefix = inside + "/" if inside else ""
        folders[:] = [f for f in folders if not f.startswith(".") and not _excluded(prefix + f, exclude)]
        names += [prefix + f for f in files if not f.startswith(".")]
    return path, names


def _posix(name: str) -> str:
    return name.replace(os.sep, "/")


def _excluded(name: str, patterns: Sequence[str]) -> bool:
    parts = name.split("/")
    leading = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    return any(
        fnmatch.fnmatchcase(candidate, pattern)
        for pattern in (pattern.removeprefix("**/").rstrip("/") for pattern in patterns)
        for candidate in (leading if "/" in pattern else parts)
    )


def heldout_names(files: Sequence[SourceFile], fraction: float) -> set[str]:
    """Names that hash below the fraction; of two names or more, at least one is held out and one is not."""
    names = sorted({file.name for file in files}, key=_hash)
    below = sum(_hash(name) < fraction for name in names)
    return set(names[: min(max(below, 1), len(names) - 1)]) if fraction > 0 else set()


def is_heldout_record(name: str, position: int, fraction: float) -> bool:
    """Whether a record of a file that is split by records hashes below the fraction."""
    return _hash(f"{name}#{position}") < fraction


def _hash(name: str) -> float:
    """A number in [0, 1) that depends on nothing but the name."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48
