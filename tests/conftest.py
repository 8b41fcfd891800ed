"""Eight fake devices for every test, and every annotated shape checked."""

import gc
import itertools
import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
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


SHARING = {
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


MAPS = Path("/proc/self/maps")
MANY_MAPS = 25_000
"""Of the 65,530 memory maps that Linux allows a process; at the limit, XLA's compiler dies of a segmentation fault."""

_tests_done = itertools.count(1)


@pytest.fixture(autouse=True)
def forget_programs():
    """Drops compiled programs, each of which holds some maps for as long as JAX remembers it, when there are too many."""
    yield
    if next(_tests_done) % 4 == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def unchecked():
    """As for a user: arguments meet the code's own checks, not those of the annotations."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
