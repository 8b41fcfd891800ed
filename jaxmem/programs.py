"""Compiled programs, kept in the user's cache folder for the next start: JAX's compilation cache.

`JAXMEM_PROGRAMS=off` turns it off, another value is the folder; where JAX is told of a folder (`JAX_COMPILATION_CACHE_DIR`),
or told to keep nothing (`JAX_ENABLE_COMPILATION_CACHE=0`), that counts.
"""

import contextlib
import hashlib
import os
import platform
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax

PROGRAMS = "JAXMEM_PROGRAMS"
"""Environment variable: a folder, or off."""
LEAST_S = 0.1
"""What compiles faster is not kept."""
_HIT = "/jax/compilation_cache/cache_hits"


def keep_programs() -> Path | None:
    """From now on; returns the folder, or None if programs are not kept, because nobody wants it or it cannot be written."""
    given = os.environ.get(PROGRAMS, "")
    if given == "off" or not jax.config.jax_enable_compilation_cache:
        return None
    if jax.config.jax_compilation_cache_dir is not None:
        return Path(jax.config.jax_compilation_cache_dir)
    folder = Path(given).expanduser() if given else _of_user()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(folder, os.W_OK | os.X_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_S)
    # a full disk, or what another program was writing: it is compiled instead
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")
    return folder


class Compiling:
    """What `timed` found."""

    seconds: float = 0.0
    n_read: int = 0
    """Programs that were on disk."""

    def __str__(self) -> str:
        return f"{'read' if self.n_read else 'compiled'} in {self.seconds:.{0 if self.seconds >= 10 else 1}f} s"


@contextlib.contextmanager
def timed() -> Iterator[Compiling]:
    """How long a first call takes until its program runs, and whether that was kept."""
    found, start_s = Compiling(), time.perf_counter()

    def listen(event: str, **_) -> None:
        found.n_read += event == _HIT

    jax.monitoring.register_event_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_listener(listen)
        found.seconds = time.perf_counter() - start_s


def _of_user() -> Path:
    """A folder per kind of processor: homes are shared between machines, and not all run what one compiles."""
    from platformdirs import user_cache_path

    return user_cache_path("jaxmem") / "programs" / hashlib.sha256(_processor().encode()).hexdigest()[:12]


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return f"{platform.machine()} {platform.processor()}"
