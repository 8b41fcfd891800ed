"""What C++ libraries write to standard error, and how they abort: kept from the terminal of a run of several processes.

When a process of a run dies, JAX's client in the others aborts them from a thread of its own, with a stack trace; no Python
code runs before it, and no callback in Python can be given to it (jaxlib 0.10 to 0.12). So the signal of the abort is caught.
"""

import contextlib
import ctypes
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable

_ENTRY = re.compile(r"^(?=[IWEF]\d{4} |\[Gloo\]|terminate called)", re.MULTILINE)
_OF_OTHERS = re.compile(r"coordination|preemption_sync|distributed/|client\.h:|\[Gloo\]|gloo/", re.IGNORECASE)
_MOST_BYTES = 1 << 20


class NativeErrors:
    """From now on what is written to file descriptor 2 goes to a file; `sys.stderr` writes where it did.

    Args:
      explain: of what was written before an abort, the sentence to end with instead, or None to abort as usual.
    """

    def __init__(self, explain: Callable[[str], str | None]):
        sys.stderr.flush()
        self._stderr = os.dup(2)
        self._file, self._recent = tempfile.TemporaryFile("a+b", buffering=0), ""  # noqa: SIM115
        os.dup2(self._file.fileno(), 2)
        sys.stderr = os.fdopen(os.dup(self._stderr), "w", buffering=1, errors="backslashreplace")
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: self._aborted(explain))
        ctypes.CDLL(None).signal(int(signal.SIGABRT), self._handler)  # Python's own would run after the abort

    def pass_on(self) -> None:
        """Writes to standard error what is no news of other processes; the file is empty then."""
        if text := self._text():
            self._recent = text  # an abort may be about to come
            self._file.truncate(0)
            self._write(without_others(text))

    def _aborted(self, explain: Callable[[str], str | None]) -> None:
        """In the thread that aborts; when it returns, the process ends by SIGABRT."""
        text = self._text()
        if sentence := explain(self._recent + text):
            self._write(f"jaxmem: {sentence}\n")
            os._exit(1)
        self._write(text)

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # nobody reads it any more
            os.write(self._stderr, text.encode())

    def _text(self) -> str:
        return os.pread(self._file.fileno(), _MOST_BYTES, 0).decode(errors="replace")


def without_others(text: str) -> str:
    r"""Without what the coordination service, its clients and gloo have logged, each entry to its last line.

    >>> without_others("W1129 00:27:27.2 1 preemption_sync_manager.cc:1] Failed\nmore\nE1129 00:27:28.0 1 a.cc:2] Bad\n")
    'E1129 00:27:28.0 1 a.cc:2] Bad\n'
    """
    return "".join(entry for entry in _ENTRY.split(text) if not _OF_OTHERS.search(entry.split("\n")[0]))
