"""What asks a run to stop: signals, whatever is ignored when it starts, and a standard output that is closed."""

import io
import os
import signal
import threading

import pytest

from jaxmem.training.progress import Progress, _Console
from jaxmem.training.signals import SIGNALS, stop_on_signals


@pytest.fixture
def at_start():
    """A function that sets how the process takes signals; as a shell does before it starts a program."""
    usual = {number: signal.getsignal(number) for number in SIGNALS}

    def handlers(**names):
        for name, handler in names.items():
            signal.signal(getattr(signal, name), handler)
        return {number: signal.getsignal(number) for number in SIGNALS}

    yield handlers
    for number, handler in usual.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("first", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_the_first_signal_is_noted_and_the_second_acts(first, at_start):
    usual = at_start(SIGTERM=signal.SIG_DFL, SIGINT=signal.default_int_handler, SIGHUP=signal.SIG_DFL)
    with stop_on_signals() as stop:
        assert not stop
        signal.raise_signal(getattr(signal, first))
        assert stop and str(stop) == first
        signal.raise_signal(signal.SIGHUP)  # which comes twice from a terminal that goes
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert {number: signal.getsignal(number) for number in SIGNALS} == usual


@pytest.mark.parametrize("ignored, asked", [("SIGINT", "SIGTERM"), ("SIGINT", "SIGHUP"), ("SIGHUP", "SIGTERM")])
def test_what_is_ignored_at_the_start_stays_ignored_and_others_stop_the_run(ignored, asked, at_start):
    """SIGINT in a script's background job, SIGHUP under nohup."""
    usual = at_start(**{ignored: signal.SIG_IGN, asked: signal.SIG_DFL})
    with stop_on_signals() as stop:
        signal.raise_signal(getattr(signal, ignored))
        assert not stop
        signal.raise_signal(getattr(signal, asked))
        assert str(stop) == asked
        signal.raise_signal(getattr(signal, ignored))
    assert {number: signal.getsignal(number) for number in SIGNALS} == usual


def test_a_run_in_a_thread_has_no_say_over_signals():
    found = []

    def enter():
        with stop_on_signals() as stop:
            found.append(bool(stop))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [False]


def pipe_without_reader() -> io.TextIOBase:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def full_disk() -> io.TextIOBase:
    return open("/dev/full", "w")


def closed_stream() -> io.TextIOBase:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("terminal", [False, True], ids=["log", "terminal"])
@pytest.mark.parametrize("make", [pipe_without_reader, full_disk, closed_stream])
def test_an_output_that_is_gone_is_told_once_and_stops_the_run(make, terminal, capfd, monkeypatch):
    file = make()
    monkeypatch.setattr("sys.__stdout__", file)  # which is made to write nowhere
    told = []
    console = _Console(file=file, force_terminal=terminal)
    with Progress(total_steps=9, console=console, on_closed=lambda: told.append(True)) as progress:
        progress.say("data")
        progress.update(1, 2.0, 3.0, 4.0)
        progress.say("stopped, all is saved", always=True)
    assert told == [True]
    assert capfd.readouterr().err == "jaxmem: stopped, all is saved\n"
    file.close()


def test_what_cannot_be_written_in_an_encoding_is_no_closed_output():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    told = []
    progress = Progress(9, console=_Console(file=file), on_closed=lambda: told.append(True))
    with progress, pytest.raises(UnicodeEncodeError):
        progress.say("ä")
    assert not told
