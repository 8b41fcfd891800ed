"""Keys and values on disk of which every commit is a version: TensorStore's OCDBT, and what it leaves to its users.

A commit writes one file of new values and of the changed nodes of a B+tree, and then replaces `manifest.ocdbt`, which lists
versions: all of a commit is there, or nothing of it. Values that no listed version refers to still take space. This drops
versions from the manifest, deletes files that no version needs, and finds the living values in files that are mostly dead.

One job writes at a time, to a local directory or one mounted. Reference: https://google.github.io/tensorstore/kvstore/ocdbt
"""

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxmem.checkpoints.reading import CheckpointError
from jaxmem.checkpoints.table_files import NamedFiles

if TYPE_CHECKING:  # `import jaxmem` stays light
    import tensorstore as ts

MANIFEST = "manifest.ocdbt"
MOST_VERSIONS = 2**16 - 1
"""As many commits fit one manifest; beyond it, OCDBT would move versions to places that this does not look at."""
_CONFIG = {"max_decoded_node_bytes": 2**16, "version_tree_arity_log2": 16}
"""A commit writes the nodes above what it changes: small ones, of a few hundred entries. Places of 2**16 versions."""
_PIECE_BYTES = 2**28  # moved in one commit
FILES = "d"
_NOWHERE = "value:::0:0"


class Space(NamedTuple):
    """Bytes of the newest version, with its tree, and of all files."""

    live_bytes: int
    disk_bytes: int
    n_keys: int


class _Node(NamedTuple):
    children: tuple[tuple[str, bytes], ...]
    """Where each is, and what its keys begin with behind what they begin with here."""
    value_bytes: Counter
    """Of the values of a leaf, in each file."""


class Versions:
    """The versions in a directory; opening reads the names behind its files.

    Raises: CheckpointError for files that have changed places.

    In use:

        versions = Versions(directory)
        number = versions.commit(lambda store: store.write("key", b"value").result())
        versions.keep({number})
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory).expanduser().resolve()
        self._nodes: dict[str, _Node] = {}
        self._files = NamedFiles(self.directory / FILES)
        self.refresh()

    def refresh(self) -> None:
        """Forgets what TensorStore has cached of this directory, and looks at new files."""
        import tensorstore as ts

        self.context = ts.Context()
        self._files.check()

    def store(self, version: int | None = None, **options: Any) -> "ts.KvStore":
        """The newest version, or that of a number, which is read-only."""
        import tensorstore as ts

        spec = {"driver": "ocdbt", "base": f"file://{self.directory}/", **options}
        spec |= {} if version is None else {"version": version}
        return ts.KvStore.open(spec, context=self.context).result()

    def numbers(self) -> list[int]:
        """Of the versions that can be read, oldest first."""
        return [version["generation_number"] for version in self._manifest()["versions"]]

    def commit(self, write: Callable[["ts.KvStore"], None], after: int | None) -> int:
        """All that `write` writes in the transaction of the store it gets, or nothing; returns the new version's number.

        Args:
          after: number of the newest version; None: there is none yet.

        Raises: CheckpointError if it cannot be written; what it has left is deleted.
        Cost: beside what is written, the list of versions read and replaced, about 50 bytes for each.
        """
        import tensorstore as ts

        if after is not None and after >= MOST_VERSIONS:
            raise CheckpointError(
                f"table {self.directory}: needs fewer than {MOST_VERSIONS} commits, got {after}; copy its rows to a new one"
            )
        self._remove_leftover()
        self._files.check()
        options = {"config": _CONFIG} if after is None else {}
        try:
            with self.failed_write_explained(), ts.Transaction(atomic=True) as transaction:
                write(self.store(**options).with_transaction(transaction))
        except Exception:  # what an interrupted commit leaves, `sweep` removes: TensorStore may be about to complete it
            self._remove_leftover()
            self._files.remove_new()
            raise
        self._files.name_new()
        return 2 if after is None else after + 1  # the first commit makes an empty version before it

    def keep(self, numbers: Collection[int]) -> None:
        """Lists only these versions and the newest; their files stay until `sweep`."""
        manifest = self._manifest()
        *older, newest = manifest["versions"]
        kept = [version for version in older if version["generation_number"] in numbers]
        if len(kept) < len(older):
            self._replace({**manifest, "versions": [*kept, newest]})

    def rewind(self, number: int) -> None:
        """Makes an older version the newest, by dropping those after it."""
        manifest = self._manifest()
        kept = [version for version in manifest["versions"] if version["generation_number"] <= number]
        if len(kept) < len(manifest["versions"]):
            self._replace({**manifest, "versions": kept})

    def space(self) -> Space:
        """Cost: reads the manifest and the sizes of files."""
        statistics = self._manifest()["versions"][-1]["root"]["statistics"]
        live = statistics["num_indirect_value_bytes"] + statistics["num_tree_bytes"]
        with os.scandir(self.directory / FILES) as files:
            return Space(live, sum(file.stat().st_size for file in files), statistics["num_keys"])

    def sweep(self) -> int:
        """Deletes the files that no listed version needs, those of killed commits too; returns the bytes freed.

        Cost: reads the nodes of the trees that this object has not read before.
        """
        versions, freed = self._manifest()["versions"], 0
        needed = self._bytes_in_files(versions)
        self._nodes = {location: self._nodes[location] for location, _ in self._reached(versions)}
        with os.scandir(self.directory / FILES) as files:
            for file in files:
                if f"{FILES}/{file.name}" not in needed:
                    freed += file.stat().st_size
                    self._files.remove([file.name])
        return freed

    def sparse_values(self) -> list[bytes]:
        """Keys of the newest version in files of which it uses less than half; no more than fit one commit."""
        newest = self._manifest()["versions"][-1:]
        used = self._bytes_in_files(newest)
        sparse = {name for name, n_bytes in used.items() if 2 * n_bytes < (self.directory / name).stat().st_size}
        found, found_bytes = [], 0
        for location, prefix in self._reached(newest):
            if not sparse.isdisjoint(self._node(location).value_bytes):
                for entry in self._dump(location)["entries"]:
                    file, n_bytes = _place(entry.get("indirect_value", _NOWHERE))
                    if file in sparse and found_bytes + n_bytes <= _PIECE_BYTES:
                        found.append(prefix + entry["key"])
                        found_bytes += n_bytes
        return found

    @contextlib.contextmanager
    def failed_write_explained(self) -> Iterator[None]:
        """One sentence instead of TensorStore's."""
        import tensorstore as ts

        try:
            yield
        except (CheckpointError, KeyboardInterrupt):
            raise
        except Exception as error:
            self.context = ts.Context()
            raise CheckpointError(
                f"table {self.directory}: needs to be written, got {reason(error)}; "
                "what was committed before is intact; make room there, and save again"
            ) from error

    def _remove_leftover(self) -> None:
        """Of a killed write: TensorStore does not truncate it, and would rename it with its old end (0.1.86)."""
        (self.directory / f"{MANIFEST}.__lock").unlink(missing_ok=True)

    def _bytes_in_files(self, versions: list[dict[str, Any]]) -> Counter:
        """How much of each file these versions use, for values and nodes."""
        used = Counter()
        for location, _ in self._reached(versions):
            file, n_bytes = _place(location)
            used[file] += n_bytes
            used.update(self._node(location).value_bytes)
        return used

    def _reached(self, versions: list[dict[str, Any]]) -> Iterator[tuple[str, bytes]]:
        """The nodes of these versions, each once, and what the keys in it begin with."""
        left = [(version["root"]["location"], b"") for version in versions if "location" in version["root"]]
        seen = set()
        while left:
            location, prefix = left.pop()
            if location not in seen:
                seen.add(location)
                yield location, prefix
                left += [(child, prefix + more) for child, more in self._node(location).children]

    def _node(self, location: str) -> _Node:
        if location not in self._nodes:
            children, value_bytes = [], Counter()
            for entry in self._dump(location)["entries"]:
                if "location" in entry:
                    children.append((entry["location"], entry["subtree_common_prefix"]))
                elif "indirect_value" in entry:
                    file, n_bytes = _place(entry["indirect_value"])
                    value_bytes[file] += n_bytes
            self._nodes[location] = _Node(tuple(children), value_bytes)
        return self._nodes[location]

    def _manifest(self) -> dict[str, Any]:
        return self._dump(None)

    def _dump(self, location: str | None) -> dict[str, Any]:
        import tensorstore as ts

        try:
            return ts.ocdbt.dump(self._base(), location, context=self.context).result()
        except Exception as error:
            what = MANIFEST if location is None else f"index in {_place(location)[0]}"
            raise CheckpointError(
                f"table {self.directory}: needs an intact {what}, got {reason(error)}; copy it back from elsewhere"
            ) from error

    def _base(self) -> "ts.KvStore":
        import tensorstore as ts

        return ts.KvStore.open(f"file://{self.directory}/", context=self.context).result()

    def _replace(self, manifest: dict[str, Any]) -> None:
        import tensorstore as ts

        self._remove_leftover()
        with self.failed_write_explained():  # written beside, synced and renamed
            self._base().write(MANIFEST, ts.ocdbt.undump_manifest(manifest)).result()
        self.refresh()


def reason(error: BaseException) -> str:
    """What TensorStore says last: before it come the names of all files on the way, behind it a specification.

    >>> reason(ValueError('DATA_LOSS: Error reading "a/b" in local file "/d": Digest mismatch [tensorstore_spec={}]'))
    'Digest mismatch'
    """
    text = str(error).partition(" [tensorstore_spec=")[0].partition(" [source locations=")[0]
    return text.rpartition('": ')[-1].partition("; at byte")[0].splitlines()[0] if text else type(error).__name__


def _place(location: str) -> tuple[str, int]:
    """The file and the bytes of "btreenode::d/ab12:16:131"."""
    _, folder, file, _, n_bytes = location.split(":")
    return folder + file, int(n_bytes)
