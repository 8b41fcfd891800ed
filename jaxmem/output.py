"""Standard output whose reader has gone: `| head` that has read enough, a terminal that was closed.

Python raises where something is printed, and once more when it ends, with an "Exception ignored" line and exit code 120.
"""

import contextlib
import io
import os
import sys


def occupy() -> None:
    """Opens standard streams that were closed when the program began, lest a file of a run gets their numbers."""
    if None in (sys.stdin, sys.stdout, sys.stderr):
        while (nothing := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(nothing)


def print_anything() -> None:
    """What the terminal cannot show, as a file's name that is no UTF-8 or a letter beyond ASCII, is printed as an escape."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError, AttributeError, OSError):  # of a notebook, or None
            stream.reconfigure(errors="backslashreplace")


def flush() -> None:
    """Writes out what is buffered. Raises: OSError, BrokenPipeError among them, if nobody can read it."""
    with contextlib.suppress(ValueError, AttributeError):  # a stream that was closed, or is None
        sys.stdout.flush()


def abandon() -> None:
    """What is still printed, buffered text included, goes nowhere."""
    for stream in (sys.__stdout__, sys.__stderr__):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            _to_nothing(stream)


def complain(sentence: str) -> None:
    """Prints a sentence to standard error, if there is anyone to read it."""
    try:
        print(sentence, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        abandon()


def _to_nothing(stream: io.TextIOBase) -> None:
    with contextlib.suppress(OSError, ValueError):  # a stream of a notebook or a test has no file
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)
        stream.flush()
