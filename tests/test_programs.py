"""Compiled programs on disk: a second process reads what the first compiled, or compiles it where nothing can be kept."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import jax, jax.numpy as jnp
from jaxmem import programs
from jaxmem.programs import keep_programs, timed
programs.LEAST_S = 0.0  # newer versions compile this faster
folder = keep_programs()
f = jax.jit(lambda x: jax.lax.fori_loop(0, 9, lambda _, x: jnp.sort(jnp.linalg.qr(x)[0] @ x, axis=1), x))
with timed() as compiling:
    f(jnp.ones((8, 8)))
print(folder, str(compiling).split()[0])
"""


def start(**environment: str) -> str:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("JAX", "XLA"))}
    environment = own | {"JAX_PLATFORMS": "cpu"} | environment
    command = [sys.executable, "-c", PROGRAM]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stderr) == (0, "")
    return found.stdout.rstrip("\n")


def test_a_second_process_reads_what_the_first_compiled(tmp_path):
    home = {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    first = start(**home)
    folder, how = first.rsplit(" ", 1)
    assert how == "compiled" and Path(folder).is_relative_to(tmp_path) and "jaxmem" in folder
    assert start(**home) == f"{folder} read"
    for kept in Path(folder).glob("*-cache"):  # as left by a full disk
        kept.write_bytes(kept.read_bytes()[:50])
    assert start(**home) == f"{folder} compiled"


@pytest.mark.parametrize("how", ["off", "no-folder", "jax"])
def test_programs_that_cannot_or_shall_not_be_kept_are_compiled(how, tmp_path):
    (tmp_path / "file").write_text("")
    environment = {
        "off": {"JAXMEM_PROGRAMS": "off"},
        "no-folder": {"JAXMEM_PROGRAMS": str(tmp_path / "file")},
        "jax": {"JAX_ENABLE_COMPILATION_CACHE": "0"},
    }[how]
    assert start(HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path), **environment) == "None compiled"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
