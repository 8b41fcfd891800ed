"""The other processes of a run: found within a minute, watched, and all ended with one sentence when one of them ends.

Every process writes a sign of life to the key-value store of JAX's coordinator, which is in process 0, and reads those of the
others. What ends one of them, an error of its own or the loss of another, is written there too, so that all end with it.
A coordinator that dies takes JAX's clients with it at once (`native_errors`).
"""

import contextlib
import json
import os
import re
import socket
import threading
import time
import traceback
from collections.abc import Callable

import jax
from jax._src import distributed

from jaxmem import output
from jaxmem.training.agreement import Disagreement
from jaxmem.training.native_errors import NativeErrors

JOIN_SECONDS = "JAXMEM_JOIN_SECONDS"
"""Environment variable: how long to wait for the other processes at the start; 60 if not set."""
BEAT_S, LOST_S, SUSPECTED_S = 1.0, 30.0, 6.0
"""Between signs of life; without one, how long until a process counts as lost, also when an exchange has failed already."""
_HEARTBEAT_S = 100  # of JAX, which aborts: later than ours
_SHUTDOWN_S = 3600  # the first process writes the report while the others wait
_KEYS = "jaxmem/peers"
_EXCHANGE_FAILED = re.compile(
    r"gloo|nccl|unavailable|socket closed|connection (closed|reset|refused)|broken pipe|coordination|heartbeat|barrier"
    r"|deadline_exceeded",
    re.IGNORECASE,
)


class Lost(RuntimeError):
    """Another process of the run is gone."""


class Peers:
    """This process among others; `jax.distributed` is initialised. From now on a thread watches them."""

    def __init__(self):
        state = distributed.global_state
        self._client, self.index, self.n = state.client, state.process_id, state.num_processes
        self._beat, self._limit_s, self._says = 0, LOST_S, "it was interrupted"
        self._seen: dict[int, tuple[str, float]] = {}
        self._speaks, self._done = threading.Lock(), threading.Event()
        threading.Thread(target=self._watch, name="jaxmem-peers", daemon=True).start()

    def finish(self) -> None:
        """This process is done, and is not missed."""
        self._done.set()
        self._set(f"alive/{self.index}", "done")

    def explained(self, error: BaseException) -> BaseException:
        """What to say of an error: the loss of another process, if it comes from that; does not return if that is said."""
        if _exchange_failed(error):
            self._limit_s = SUSPECTED_S
            time.sleep(2 * SUSPECTED_S)
            reason = str(error).splitlines()[0][:200]
            error = Lost(self._lost(f"one of them ({reason})"))
        self._speaks.acquire()
        self._says = None if isinstance(error, Disagreement | Lost) else str(error)  # these, all know
        return error

    def leave(self, code: int, sentence: str | None = None) -> None:
        """Ends this process; the others follow with this sentence, or that of the error that was `explained`."""
        if sentence := sentence or self._says:
            self._set(f"ended/{self.index}", json.dumps([code, sentence]))
        self._depart(code, 5.0)

    def _watch(self) -> None:
        while not self._done.wait(BEAT_S):
            self._beat += 1
            try:
                if _native is not None:
                    _native.pass_on()
                self._set(f"alive/{self.index}", str(self._beat))
                told = dict(self._client.key_value_dir_get(f"{_KEYS}/"))
            except Exception:  # a coordinator that does not answer any more aborts this process
                continue
            if (verdict := self._verdict(told)) and self._speaks.acquire(blocking=False):
                sentence, code, lost = verdict
                output.complain(f"jaxmem: {sentence}")
                if lost is not None:
                    self._set(f"lost/{lost}", sentence)
                self._depart(code, 3 * BEAT_S)

    def _verdict(self, told: dict[str, str]) -> tuple[str, int, int | None] | None:
        """What ends this process too: sentence, exit code, and which process is lost, if one is."""
        now = time.monotonic()
        for key, value in told.items():
            kind, process = key.removeprefix(f"{_KEYS}/").split("/")
            other = int(process)
            if kind == "lost":
                return value, 1, other
            if kind == "ended" and other != self.index:
                code, sentence = json.loads(value)
                return (
                    f"train: needs all {self.n} processes, got process {other} that has ended: {sentence}",
                    code,
                    None,
                )
            if kind == "alive" and other != self.index:
                if value == "done":
                    self._seen.pop(other, None)
                elif value != self._seen.get(other, ("", 0))[0]:
                    self._seen[other] = (value, now)
        for other, (_, last) in self._seen.items():
            if now - last > self._limit_s:
                return self._lost(f"process {other} (no sign of life for {now - last:.0f} s)"), 1, other
        return None

    def _lost(self, whom: str) -> str:
        return (
            f"train: needs all {self.n} processes, lost {whom}; "
            "start all of them again with --resume, which goes on from the newest checkpoint"
        )

    def _depart(self, code: int, patience_s: float) -> None:
        """The process with the coordinator goes last: without it the others could not be told."""
        with contextlib.suppress(OSError):
            output.flush()
        if _native is not None:
            _native.pass_on()
        self._set(f"left/{self.index}", "")
        end = time.monotonic() + patience_s
        while self.index == 0 and time.monotonic() < end:
            told = dict(self._client.key_value_dir_get(f"{_KEYS}/"))
            if sum(key.startswith(f"{_KEYS}/left/") for key in told) == self.n:
                break
            time.sleep(0.05)
        os._exit(code)

    def _set(self, key: str, value: str) -> None:
        self._client.key_value_set(f"{_KEYS}/{key}", value, allow_overwrite=True)


_peers: Peers | None = None
_native: NativeErrors | None = None


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Finds the other processes; before anything asks JAX for devices.

    Args:
      coordinator: host:port of process 0, with how many there are and which this is; None: what JAX finds out itself
        (a TPU pod, Slurm, Open MPI, Kubernetes), or what `jax.distributed.initialize` was given before.

    Raises:
      ValueError: not in a cluster that JAX knows, or something else is at the coordinator's port.
      RuntimeError: the others cannot be found. A coordinator that does not answer in time ends the process, with a sentence.
    """
    global _peers, _native
    state, seconds = distributed.global_state, os.environ.get(JOIN_SECONDS, "60")
    if not seconds.isdecimal() or not int(seconds):
        raise ValueError(f"train: needs a whole number of seconds in {JOIN_SECONDS}, got {seconds!r}; e.g. 60")
    wait_s = int(seconds)
    quiet = os.environ.get("JAXMEM_TRACEBACK") != "1"
    if state.client is None:
        if coordinator is not None and process == 0:
            _require_free(coordinator)
        jax.config.update("jax_enable_preemption_service", False)  # signals are ours
        timeouts = {"initialization_timeout": wait_s, "heartbeat_timeout_seconds": _HEARTBEAT_S}
        if quiet:
            _native = NativeErrors(lambda text: _why_aborted(text, wait_s))
        try:
            jax.distributed.initialize(
                coordinator, processes, process, shutdown_timeout_seconds=_SHUTDOWN_S, **timeouts
            )
        except ValueError as error:
            if coordinator is not None:
                raise
            raise ValueError(
                "train --distributed: needs a cluster that JAX recognises (a TPU pod, Slurm, Open MPI, Kubernetes), "
                f"got none ({error}); start it there, or give --coordinator HOST:PORT --processes N --process I"
            ) from error
        except RuntimeError as error:
            raise RuntimeError(
                f"train: needs the other processes, got {str(error).splitlines()[0]} at the coordinator's address "
                f"{state.coordinator_address}; choose another port, or start all of them again"
            ) from error
    elif quiet:
        _native = NativeErrors(lambda text: _why_aborted(text, wait_s))
    if state.num_processes > 1:
        _peers = Peers()


def _require_free(coordinator: str) -> None:
    """JAX shares a port with another run's coordinator without a word, and dies in C++ where it cannot."""
    everywhere, dual = ("", int(coordinator.rpartition(":")[2])), socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if dual else socket.AF_INET
        socket.create_server(everywhere, family=family, dualstack_ipv6=dual).close()
    except OSError as error:
        raise ValueError(
            f"train: needs a free port for the coordinator, got {coordinator} ({os.strerror(error.errno)}); "
            "choose another port, or end the run that has it"
        ) from error


def together(run: Callable[[], int]) -> int:
    """The exit code of `run`; where there are several processes and it is not 0, tells the others, and does not return."""
    try:
        code = run()
    except BaseException as error:
        if _peers is None or (isinstance(error, SystemExit) and not error.code):
            raise
        if isinstance(error, SystemExit):  # of options that cannot be read: it has been said
            _peers.leave(error.code if isinstance(error.code, int) else 1, "its options cannot be read")
        traceback.print_exception(error)
        _peers.leave(1, f"{type(error).__name__}: {error}".splitlines()[0])
    if _peers is not None:
        _peers.leave(code) if code else _peers.finish()
    return code


def explained(error: BaseException) -> BaseException:
    """What to say of an error that ends this process, in place of it."""
    return error if _peers is None else _peers.explained(error)


def _exchange_failed(error: BaseException | None) -> bool:
    """Whether it, or what it comes from, tells of a connection to another process."""
    while error is not None:
        is_ours = isinstance(error, ValueError) and ": needs " in str(error)
        if not is_ours and not isinstance(error, Disagreement) and _EXCHANGE_FAILED.search(str(error)):
            return True
        error = error.__cause__
    return False


def _why_aborted(text: str, wait_s: int) -> str | None:
    """A sentence for the end of JAX's client; None for any other abort."""
    if "JAX distributed service" not in text and "coordination" not in text:
        return None
    state = distributed.global_state
    if _peers is not None:
        holder = f"process 0, which holds the coordinator at {state.coordinator_address}"
        return _peers._lost(holder if _peers.index else "one of them")
    needs = f"train: needs all {state.num_processes} processes within {wait_s} s"
    after = f"start all of them, or set {JOIN_SECONDS} to wait longer"
    if "DEADLINE_EXCEEDED" not in text and "UNAVAILABLE" not in text:
        found = re.search(r"absl::Status: (.*)", text)
        reason = found[1] if found else "an error"
        return f"{needs}, got {reason} from the coordinator at {state.coordinator_address}; {after}"
    if state.process_id and not _answers(state.coordinator_address):
        return f"{needs}, got no answer from the coordinator at {state.coordinator_address} (process 0); {after}"
    return f"{needs}, got fewer at the coordinator at {state.coordinator_address}; {after}"


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=2):
            return True
    except (OSError, ValueError):
        return False
