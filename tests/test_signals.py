"""Signals to a real process: what it does, and what it exits with."""

import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from pixelgen_fast import signals
from pixelgen_fast.engine.collectives import any_rank
from pixelgen_fast.signals import REQUEUE, StopAtOnce, Stopped, StopRequest

WORKER = Path(__file__).with_name("signal_worker.py")


def start(task: str) -> subprocess.Popen:
    """A worker that hears every signal, also where nohup has started the tests."""
    command = [sys.executable, str(WORKER), task]
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_an_interrupt_finishes_the_step_and_the_exit_code_asks_for_requeue(number):
    process = start("obey")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (out, process.returncode) == (f"saved after {number.name}\n", REQUEUE), err


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_termination_does_too_and_children_are_not_confused():
    process = start("children")
    assert process.stdout.readline() == "SIGTERM True False\n"
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert (out, process.returncode) == ("saved after SIGTERM\n", REQUEUE), err


def test_a_second_interrupt_stops_at_once():
    process = start("linger")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "asked\n"
    time.sleep(2 * signals.ECHO_SECONDS)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert out == "" and "KeyboardInterrupt" in err
    assert process.returncode not in (0, REQUEUE)


def test_an_echo_of_an_interrupt_is_not_a_second_one(monkeypatch):
    clock = iter([100.0, 100.0 + signals.ECHO_SECONDS / 2, 100.0 + signals.ECHO_SECONDS * 2])
    monkeypatch.setattr(signals.time, "monotonic", lambda: next(clock))
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert not stop.requested and stop.name is None
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested and stop.name == "SIGTERM" and any_rank([stop.requested])[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_work_that_has_nothing_to_save_is_ended_by_an_exception_that_no_handler_of_errors_takes():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="^SIGTERM$"), StopAtOnce():
        try:
            with StopRequest() as stop:
                signal.raise_signal(signal.SIGTERM)
                assert stop.requested
            signal.raise_signal(signal.SIGTERM)
        except Exception:
            pytest.fail("taken for an error")
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_wish_that_a_library_swallowed_is_not_lost():
    with StopAtOnce():
        with suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        with StopRequest() as stop:
            assert stop.name == "SIGTERM"
