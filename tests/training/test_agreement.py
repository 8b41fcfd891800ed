"""Processes of a run: what they compare at the start, and say when one of them ends; real ones: test_processes.py."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxmem import cli
from jaxmem.checkpoints import RowArray, TableStore
from jaxmem.training import agreement, peers
from jaxmem.training.experiment import load_experiment
from jaxmem.training.table_checkpoints import TableCheckpoints

TINY = Path(__file__).with_name("tiny.py")
CONFIG = load_experiment(TINY)


class Coordinator:
    """The key-value store that all processes share."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self.changed:
            assert allow_overwrite or key not in self.values
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key, timeout_in_ms):
        with self.changed:
            assert self.changed.wait_for(lambda: key in self.values, 20)
            return self.values[key]


def agreed(monkeypatch, *facts) -> list[Exception | None]:
    """What `agree` raises on each process."""
    coordinator, local, raised = Coordinator(), threading.local(), [None] * len(facts)

    class State:
        client, num_processes = coordinator, len(facts)
        process_id = property(lambda self: local.index)

    rounds = defaultdict(lambda: iter(range(99)))

    def process(index):
        local.index = index
        try:
            agreement.agree(lambda: facts[index])
        except ValueError as error:
            raised[index] = error

    threads = [threading.Thread(target=process, args=(index,)) for index in range(len(facts))]
    with monkeypatch.context() as patch:
        patch.setattr(agreement, "distributed", SimpleNamespace(global_state=State()))
        patch.setattr(agreement, "next", lambda _: next(rounds[local.index]), raising=False)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return raised


def test_what_differs_is_named_on_all_processes(monkeypatch, tmp_path):
    facts = agreement.run_facts(CONFIG, tmp_path, True)
    assert agreed(monkeypatch, facts, facts) == [None, None]
    optimizer = dataclasses.replace(CONFIG.optimizer, learning_rate=0.5)
    other = agreement.run_facts(dataclasses.replace(CONFIG, seed=3, optimizer=optimizer), tmp_path, False)
    errors = agreed(monkeypatch, facts, facts, other)
    assert len({str(error) for error in errors}) == 1 and all(isinstance(e, agreement.Disagreement) for e in errors)
    assert str(errors[0]) == (
        "train: needs the same on all 3 processes, got "
        "config.optimizer.learning_rate: 0.01 on processes 0, 1 and 0.5 on process 2; "
        "config.seed: 0 on processes 0, 1 and 3 on process 2; "
        "--resume: True on processes 0, 1 and False on process 2; "
        "start all of them with the same experiment, options, data and code"
    )
    assert agreement.agree(lambda: 1 / 0) is None, "one process alone has nothing to compare"


@pytest.mark.parametrize("what", ["code", "version", "checkpoints", "option"])
def test_facts_are_of_all_that_decides_a_run(what, tmp_path, monkeypatch):
    before = agreement.run_facts(CONFIG, tmp_path, True)
    if what == "code":
        package = shutil.copytree(Path(cli.__file__).parent, tmp_path / "jaxmem")
        with (package / "algebra" / "topk.py").open("a") as file:
            file.write("# another\n")
        monkeypatch.setattr(agreement.jaxmem, "__file__", str(package / "__init__.py"))
        name = "code of jaxmem/algebra/topk.py"
    elif what == "version":
        monkeypatch.setattr(
            agreement.importlib.metadata, "version", lambda name: "9" if name == "optax" else before[name]
        )
        name = "optax"
    elif what == "checkpoints":
        monkeypatch.setattr(agreement, "complete_steps", lambda directory: [4])
        name = "checkpoints of the run"
    else:
        with jax.default_matmul_precision("float32"):
            after = agreement.run_facts(CONFIG, tmp_path, True)
        name = "jax_default_matmul_precision"
    if what != "option":
        after = agreement.run_facts(CONFIG, tmp_path, True)
    assert [line.split(": ")[0] for line in agreement.differences([before, after])] == [name]


def watcher(n: int, index: int = 0) -> peers.Peers:
    """Without its thread."""
    watching = object.__new__(peers.Peers)
    watching.n, watching.index, watching._seen, watching._limit_s = n, index, {}, 0.05
    return watching


def test_what_others_tell_ends_this_process():
    alive = {"jaxmem/peers/alive/0": "7", "jaxmem/peers/alive/1": "5", "jaxmem/peers/alive/2": "done"}
    watching = watcher(3)
    assert watching._verdict(alive) is None
    time.sleep(0.1)
    assert watching._verdict(alive | {"jaxmem/peers/alive/1": "6"}) is None, "it has moved on"
    time.sleep(0.1)
    sentence, code, lost = watching._verdict(alive | {"jaxmem/peers/alive/1": "6"})
    assert (code, lost) == (1, 1)
    assert sentence.startswith("train: needs all 3 processes, lost process 1 (no sign of life for ")
    assert sentence.endswith("; start all of them again with --resume, which goes on from the newest checkpoint")
    ended = {"jaxmem/peers/ended/2": json.dumps([2, "data: needs text, got none; name another"])}
    assert watcher(3)._verdict(alive | ended) == (
        "train: needs all 3 processes, got process 2 that has ended: data: needs text, got none; name another",
        2,
        None,
    )
    assert watcher(3)._verdict({"jaxmem/peers/lost/1": "so it is"}) == ("so it is", 1, 1)


def test_a_standard_error_that_nobody_reads_ends_nothing():
    """What C++ has written there is passed on, and an abort explained, to no one."""
    program = """
import os, sys
from jaxmem import output
from jaxmem.training.native_errors import NativeErrors
native = NativeErrors(lambda text: "train: needs all 2 processes, lost one of them")
os.write(2, b"E1129 00:27:28.0 1 a.cc:2] Bad\\n")
native.pass_on()
output.complain("a sentence")
print("goes on", flush=True)
os.abort()
"""
    reader, writer = os.pipe()
    os.close(reader)
    found = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=writer, timeout=60)
    os.close(writer)
    assert (found.returncode, found.stdout) == (1, b"goes on\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    "process, got",
    [
        (1, "no answer from the coordinator at {address} (process 0)"),
        (0, "fewer at the coordinator at {address}"),
    ],
)
def test_processes_that_do_not_come_are_told(process, got):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    together = ["--coordinator", address, "--processes", "2", "--process", str(process)]
    found = subprocess.run(
        [sys.executable, "-m", "jaxmem.cli", "train", str(TINY), *together],
        env=os.environ | {"JAXMEM_JOIN_SECONDS": "1", "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr == (
        f"jaxmem: train: needs all 2 processes within 1 s, got {got.format(address=address)}; "
        "start all of them, or set JAXMEM_JOIN_SECONDS to wait longer\n"
    )


def test_a_port_that_is_in_use_is_told(capsys):
    """Two coordinators of JAX share one without a word, and processes meet either."""
    with socket.create_server(("localhost", 0), reuse_port=True) as other:
        address = f"localhost:{other.getsockname()[1]}"
        words = ["train", str(TINY), "--coordinator", address, "--processes", "2", "--process", "0"]
        assert cli.main(words) == 2
    assert capsys.readouterr().err == (
        f"jaxmem: train: needs a free port for the coordinator, got {address} (Address already in use); "
        "choose another port, or end the run that has it\n"
    )


@pytest.mark.parametrize(
    "words, got",
    [
        (["--coordinator", "here:1"], "--coordinator here:1"),
        (
            ["--coordinator=here:1", "--processes", "2", "--process", "2"],
            "--coordinator here:1, --processes 2, --process 2",
        ),
        (
            ["--coordinator=here:99999", "--processes=2", "--process=0"],
            "--coordinator here:99999, --processes 2, --process 0",
        ),
        (["--coordinator", "here", "--processes=2", "--process=0"], "--coordinator here, --processes 2, --process 0"),
    ],
)
def test_options_of_processes_belong_together(words, got, capsys):
    assert cli.main(["train", str(TINY), *words]) == 2
    assert f"with --processes N and --process 0..N-1, got {got}; give all three\n" in capsys.readouterr().err


def test_tables_whose_folders_changed_places_are_told(tmp_path):
    config = load_experiment(TINY.with_name("tiny_memory.py"))
    for name in ("a.0", "a.1"):
        store = TableStore.create(tmp_path / name, 9, {"values": RowArray(4)}, name)
        store.write([1], {"values": np.ones((1, 4), np.float32)}, 2)
    tables = TableCheckpoints(tmp_path, config)
    assert tables._store("a", (1,)).steps() == [2]
    for before, after in (("a.0", "b"), ("a.1", "a.0"), ("b", "a.1")):
        (tmp_path / before).rename(tmp_path / after)
    with pytest.raises(ValueError, match=r"a.1: needs the rows of a.1, got those of a.0; rename the folders back"):
        tables._store("a", (1,))
