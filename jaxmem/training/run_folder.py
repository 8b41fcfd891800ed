"""The folder of a run: what is in it, whether there is a run to lose, and that one program at a time writes there.

config.json       the resolved config of the last start; each checkpoint has its own copy, which counts
metrics.jsonl     lines of the steps that were made
checkpoints/      <step>/ for each; the file `here` says that this folder is that of the run, and not a disk missing
tables/           memory tables of which checkpoints write the rows that changed
code/             the experiment's file, and others that define classes of its config
lock              who writes here; it counts as long as that process holds it
"""

import contextlib
import datetime
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxmem.checkpoints import complete_steps
from jaxmem.config import read_json_object
from jaxmem.training.metrics import METRICS_FILE, explain_failed_write

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"
TABLES = "tables"
LOCK_FILE = "lock"
HERE = "here"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
"""What a file system without locks answers."""


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[str]:
    """Holds the folder's lock, which the operating system takes back when the process ends, however it ends.

    A folder that was made for it, and in which nothing else was written, is removed again.

    Yields: what to tell: nothing, or that the file system has no locks.
    Raises: ValueError if another run has it; OSError if the folder cannot be written.
    """
    is_new = not run_dir.exists()
    if not is_new and not run_dir.is_dir():
        raise ValueError(f"run: needs a folder, got {str(run_dir)!r}, which is a file; name another with --out")
    with explain_failed_write(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        file, note = _lock(run_dir)
    path = run_dir / LOCK_FILE
    try:
        yield note
    finally:
        with contextlib.suppress(OSError):  # while it is held: else it might be the next one's
            path.unlink(missing_ok=True)
            if is_new and not any(run_dir.iterdir()):
                run_dir.rmdir()
        os.close(file)


def _lock(run_dir: Path) -> tuple[int, str]:
    path = run_dir / LOCK_FILE
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        note = ""
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(file, 1000, 0).decode(errors="replace").strip() or "another process"
            os.close(file)
            raise ValueError(
                f"run: needs a folder that no other run writes to, got {str(run_dir)!r}, which {holder} holds; "
                "wait for its end or stop it, or name another folder with --out"
            ) from None
        except (ImportError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                os.close(file)
                raise
            note = f"the file system of {run_dir} has no locks: see to it that no second run writes there"
        with contextlib.suppress(FileNotFoundError):  # the one before has removed it in the meantime
            if os.path.samestat(os.fstat(file), os.stat(path)):
                began = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
                os.ftruncate(file, 0)
                os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()} since {began}\n".encode(), 0)
                return file, note
        os.close(file)


def has_begun(run_dir: Path) -> bool:
    """Whether there is something to lose; a run that found its input wrong, say, leaves nothing."""
    metrics = run_dir / METRICS_FILE
    return bool(
        (metrics.is_file() and metrics.stat().st_size)
        or has_tables(run_dir)
        or any(path.name != HERE for path in checkpoint_files(run_dir))
    )


def checkpoint_files(run_dir: Path) -> list[Path]:
    """What is in checkpoints/, complete or not."""
    folder = run_dir / CHECKPOINTS
    return sorted(folder.iterdir()) if folder.is_dir() else []


def has_tables(run_dir: Path) -> bool:
    """Whether rows of memory tables were written."""
    folder = run_dir / TABLES
    return folder.is_dir() and any(any(table.iterdir()) for table in folder.iterdir() if table.is_dir())


def mark_checkpoints(run_dir: Path) -> None:
    """Leaves a sign in checkpoints/: if that folder is empty one day, it is another one."""
    with explain_failed_write(run_dir / CHECKPOINTS):
        (run_dir / CHECKPOINTS / HERE).touch()


def read_config(run_dir: Path) -> dict[str, Any]:
    """What config.json holds. Raises: ValueError, as `read_json_object`."""
    steps = complete_steps(run_dir / CHECKPOINTS)
    copy = f"copy {CHECKPOINTS}/{steps[-1]}/run_config/run_config.json there" if steps else "put it back, or remove it"
    return read_json_object(run_dir / CONFIG_FILE, copy)
