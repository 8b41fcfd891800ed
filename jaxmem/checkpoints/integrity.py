"""Checksums of a checkpoint's files, written as its last item and checked before anything is read.

Orbax makes a checkpoint appear at once, by a rename, but a disk may lose or change bytes afterwards, and neither zarr
nor its compression notices a flipped bit. Sizes and CRC-32 do, and they say which file is damaged.
"""

import json
import zlib
from collections.abc import Iterator

import orbax.checkpoint as ocp
from etils import epath

CHECKSUMS = "checksums"
_FILE = f"{CHECKSUMS}.json"
_ALWAYS_READ_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 24


class DamagedCheckpoint(RuntimeError):
    """Files of a checkpoint that are missing, truncated or changed."""


class ChecksumHandler(ocp.JsonCheckpointHandler):
    """Orbax item that lists size and CRC-32 of every file of the items registered before it, and the step it was saved with.

    Args:
      read_all: also the CRC of files above 1 MiB, which costs reading them once more; else only their sizes.
    """

    def __init__(self, read_all: bool):
        super().__init__(_FILE)
        self._read_all = read_all

    def finalize(self, directory: epath.Path) -> None:
        """Writes the list; orbax finalizes items in the order of registration and then renames the checkpoint."""
        files = {}
        for item in directory.parent.iterdir():
            if item.is_dir() and item.name != directory.name:
                for path in _files(item):
                    size = path.stat().length
                    read = self._read_all or size <= _ALWAYS_READ_BYTES
                    files[str(path.relative_to(directory.parent))] = [size, _crc32(path) if read else None]
        step = json.loads((directory / _FILE).read_text())["step"]  # what was saved as this item
        (directory / _FILE).write_text(json.dumps({"step": step, "files": files}))


def check_files(checkpoint: epath.Path) -> None:
    """Compares the files of a checkpoint with its checksums, and its step with the name of its folder.

    Older checkpoints do not know their step.

    Raises: DamagedCheckpoint, naming the first file that differs.
    Cost: reads every file that has a checksum once, about a second per GB.
    """
    name = f"{CHECKSUMS}/{_FILE}"
    try:
        written = json.loads((checkpoint / name).read_text())
        if "step" in written and str(written["step"]) != checkpoint.name:
            raise DamagedCheckpoint(
                f"checkpoint {checkpoint.name} is damaged: its folder holds that of step {written['step']}, renamed"
            )
        written = written.get("files", written)
        files = {name: (size, crc) for name, (size, crc) in written.items()}
        for name, (size, crc) in files.items():
            path = checkpoint / name
            if (found := path.stat().length) != size:
                raise DamagedCheckpoint(f"checkpoint {checkpoint.name} is damaged: {name} has {found} of {size} bytes")
            if crc is not None and _crc32(path) != crc:
                raise DamagedCheckpoint(f"checkpoint {checkpoint.name} is damaged: {name} does not match its checksum")
    except (OSError, ValueError, TypeError, AttributeError) as error:  # missing, unreadable, or no list of checksums
        raise DamagedCheckpoint(f"checkpoint {checkpoint.name} is damaged: cannot read {name} ({error})") from error


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _crc32(path: epath.Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return crc
