"""Which files are read, and a report of what is wrong with them.

Nothing that is wrong with a file stops a run: it is counted in a `DataReport`. Only a path that names nothing is an
error, at the start.
"""

import dataclasses
import fnmatch
import glob
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
    not_text: int = 0
    """Files in folders or behind globs that are no UTF-8 text, and were left out."""
    undecodable_bytes: int = 0
    failed_reads: int = 0
    """Pieces that could not be read any more later, in the middle of a run, or were not the same: left out."""
    examples: list[str] = dataclasses.field(default_factory=list)
    """The first few of what was unreadable or no text, with the reason."""
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    """The first few files whose pieces could not be read later, with the reason."""
    split: str = ""
    """By what the held-out text was chosen, and how much it is."""

    def unreadable_because(self, name: str, reason: object) -> None:
        """Counts something that the index could not read."""
        self.unreadable += 1
        self._remember(name, reason)

    def not_text_because(self, name: str, kind: str) -> None:
        """Counts a file that is something else."""
        self.not_text += 1
        self._remember(name, kind)

    def failed_read_because(self, name: str, reason: object) -> None:
        """Counts a piece that disappeared or changed after the index was made."""
        self.failed_reads += 1
        if len(self.failed) < NAMES_IN_REPORT:
            self.failed.setdefault(name, _words(reason))

    def _remember(self, name: str, reason: object) -> None:
        if len(self.examples) < NAMES_IN_REPORT:
            self.examples.append(f"{name}: {_words(reason)}")

    def __str__(self) -> str:
        n_of = lambda count, what: f"{count:,} {what if count == 1 else f'{what}s'}"
        line = f"{n_of(self.documents, 'document')} in {n_of(self.files, 'file')}, "
        line += f"{n_of(self.bytes, 'byte')} in {n_of(self.pieces, 'piece')}"
        for count, what in (
            (self.empty, "empty"),
            (self.undecodable_bytes, "undecodable bytes"),
            (self.unreadable, "unreadable"),
            (self.not_text, "not text"),
            (self.failed_reads, "failed reads"),
        ):
            line += f", {count:,} {what}" if count else ""
        examples = [*self.examples, *(f"{name}: {reason}" for name, reason in self.failed.items())]
        line += f" ({'; '.join(examples)})" if examples else ""
        return line + (f"; {self.split}" if self.split else "")


def _words(reason: object) -> str:
    return str(getattr(reason, "strerror", None) or reason)


class SourceFile(NamedTuple):
    """A file and what it is called wherever the data lies."""

    name: str
    """Path relative to the folder that was asked for, with "/"."""
    path: str
    named: bool = False
    """Named itself, rather than found in a folder or by a glob."""


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
        path = os.path.expanduser(pattern)
        is_glob = glob.has_magic(pattern) and not os.path.lexists(path)
        if is_glob:
            root, names = _glob(path)
        else:
            root, names = _walk(what, path, exclude, report)
        kept = [name for name in sorted(names) if not _excluded(name, exclude)]
        if not kept:
            reasons = [f"{len(names)} excluded"] * bool(names) + report.examples
            excluded = f" ({'; '.join(reasons)})" if reasons else ""
            raise ValueError(
                f"{what} data: needs at least one file, got {what}={pattern!r} with none{excluded}; put text, .jsonl "
                "or .array_record files there, or name another folder, file or glob"
            )
        named = not is_glob and not os.path.isdir(path)
        for name in kept:
            found_path = os.path.join(root, name)
            found.setdefault(os.path.realpath(found_path), SourceFile(name, found_path, named))
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
        for f in folders:
            if os.path.islink(os.path.join(folder, f)):
                report.unreadable_because(prefix + f, "a link to a folder, not followed; name that folder itself")
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
