"""The tests themselves: a session whose processes hold more memory than is allowed fails, and each says what it held."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["0", "1"])
@pytest.mark.parametrize("mib, code", [(2048, 0), (1, 1)])
def test_a_session_that_holds_too_much_fails(mib, code, processes):
    environment = os.environ | {"TEST_MEMORY_MIB": str(mib)}
    command = [sys.executable, "-m", "pytest", "-n", processes, "-p", "no:cacheprovider", "layers/test_rotary.py"]
    found = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == code, found.stdout + found.stderr
    assert f"needs at most {mib:,} MiB" in found.stdout and ("too much memory" in found.stdout) == (code == 1)
