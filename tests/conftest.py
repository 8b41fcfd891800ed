"""Eight fake devices for every test, and every annotated shape checked."""

import ctypes
import gc
import itertools
import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAXMEM_PROGRAMS"] = "off"  # nothing comes from, or is left in, the user's cache folder
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Unoptimised code compiles faster; what tests ask is no matter of optimisation. The caller's flags stand last and win.
    os.environ["XLA_FLAGS"] = " ".join(
        (
            "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
            "--xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1",
            # later versions of XLA, libtpu's too, do not know it, and die of what they do not know
            "--xla_cpu_use_fusion_emitters=false" if version("jax") < "0.11" and find_spec("libtpu") is None else "",
            os.environ.get("XLA_FLAGS", ""),
        )
    )

import jax
import jaxtyping
import pytest

jaxtyping.install_import_hook(
    [f"jaxmem.{part}" for part in ("algebra", "layers", "models", "recurrences", "sharding")], "beartype.beartype"
)

collect_ignore_glob = ["golden/*"]  # scripts that make golden arrays need torch, the tests do not


LONG = "processes"
"""They come first, so that the others of a session need not wait for them at its end, and one after the other."""
SHARING = {
    "test_faults.py": LONG,
    "test_processes.py": LONG,
    "test_table_checkpoints.py": "tables",
    "test_loop.py": "runs",
    "test_resume.py": "runs",
    "test_generation.py": "generation",
    "test_decoder.py": "decoder",
}
"""Files whose tests share a trained run or compiled programs, and a word for what they share."""


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """Tests that share something, as the laws of one mixer do, run in one process."""
    for item in items:
        if item.path.name == "test_laws.py" and "name" in item.callspec.params:
            item.add_marker(pytest.mark.xdist_group(item.callspec.params["name"]))
        elif item.path.name in SHARING:
            item.add_marker(pytest.mark.xdist_group(SHARING[item.path.name]))
    items.sort(key=lambda item: SHARING.get(item.path.name) != LONG)


MAPS, STATUS = Path("/proc/self/maps"), Path("/proc/self/status")
MANY_MAPS = 25_000
"""Of the 65,530 memory maps that Linux allows a process; at the limit, XLA's compiler dies of a segmentation fault."""
MOST_MIB = int(os.environ.get("TEST_MEMORY_MIB", 2048))
"""That a process of the tests may hold at its peak; more fails the session."""
MUCH_MIB = 1500
"""Above it, compiled programs are dropped."""

_tests_done = itertools.count(1)
_peaks: dict[str, int] = {}


def pytest_configure(config):
    config.pluginmanager.register(Forgetting())  # hooks of a conftest see the tests beside it, not those in docstrings


class Forgetting:
    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self):
        forget_programs()


def forget_programs():
    """Drops compiled programs, each of which holds memory and maps as long as JAX remembers it, when there is too much."""
    if memory_mib("VmRSS") > MUCH_MIB or (next(_tests_done) % 4 == 0 and n_maps() > MANY_MAPS):
        jax.clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)


def n_maps() -> int:
    """Memory maps of this process; 0 where no system tells."""
    return MAPS.read_bytes().count(b"\n") if MAPS.exists() else 0


def memory_mib(kind: str) -> int:
    """Of this process, in MiB: VmRSS, what it holds, or VmHWM, the most that it held; 0 where no system tells."""
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith(f"{kind}:")), 0)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist sends a worker's output
def pytest_sessionfinish(session):
    """A session whose processes needed too much memory fails."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["peak_mib"] = memory_mib("VmHWM")
        return
    if not _peaks:
        _peaks["this process"] = memory_mib("VmHWM")
    if max(_peaks.values()) > MOST_MIB and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """A worker of pytest-xdist has ended."""
    _peaks[node.gateway.id] = getattr(node, "workeroutput", {}).get("peak_mib", 0)


def pytest_terminal_summary(terminalreporter):
    """The memory of each process, and that it was too much."""
    if max(_peaks.values(), default=0) > MOST_MIB:
        terminalreporter.section("too much memory", red=True)
    peaks = ", ".join(f"{name} {mib:,} MiB" for name, mib in sorted(_peaks.items()))
    terminalreporter.write_line(f"peak memory: {peaks}; needs at most {MOST_MIB:,} MiB")


@pytest.fixture
def unchecked():
    """As for a user: arguments meet the code's own checks, not those of the annotations."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
