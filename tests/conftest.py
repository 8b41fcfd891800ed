"""Eight fake devices for every test, and every annotated shape checked."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jaxtyping
import pytest

jaxtyping.install_import_hook(
    [f"jaxmem.{part}" for part in ("algebra", "layers", "models", "recurrences", "sharding")], "beartype.beartype"
)

collect_ignore_glob = ["golden/*"]  # scripts that make golden arrays need torch, the tests do not


def pytest_collection_modifyitems(items):
    """The laws of one mixer share compiled programs, the tests of the loop a trained run: one process runs them."""
    for item in items:
        if item.path.name == "test_laws.py" and "name" in item.callspec.params:
            item.add_marker(pytest.mark.xdist_group(item.callspec.params["name"]))
        elif item.path.name == "test_loop.py":
            item.add_marker(pytest.mark.xdist_group("loop"))


@pytest.fixture
def unchecked():
    """As for a user: arguments meet the code's own checks, not those of the annotations."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
