"""Signals to stop: the first one asks, the second one ends, at any moment."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vit_flax.signals import EXIT_PREEMPTED, STOP_SIGNALS, Interrupted, StopSignal

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_before_there_is_something_to_save_the_first_one_ends_the_process(number, capsys):
    with pytest.raises(SystemExit) as left, StopSignal():
        signal.raise_signal(number)
    assert left.value.code == EXIT_PREEMPTED
    assert f"Stopped by {number.name} before the first step; nothing was lost." in capsys.readouterr().err


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_afterwards_it_is_only_noted(number, capsys):
    with StopSignal() as stop:
        stop.hold()
        assert stop.received is None
        signal.raise_signal(number)
        assert stop.received == number.name
    assert capsys.readouterr().err == ""


def test_an_evaluation_is_left_between_two_batches():
    seen: list[int] = []
    with StopSignal() as stop:
        stop.hold()
        items = (signal.raise_signal(signal.SIGTERM) if item == 3 else item for item in range(5))
        with pytest.raises(Interrupted):
            seen.extend(stop.until_received(items))
    assert seen == [0, 1, 2]


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopSignal():
        assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


@contextmanager
def start(code: str) -> Iterator[subprocess.Popen]:
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_the_second_one_ends_the_process_even_where_python_does_not_run():
    """One call into C for minutes, as a compilation is: Python's own handlers have to wait for its end."""
    code = (
        "import hashlib\nfrom vit_flax.signals import StopSignal\n"
        "with StopSignal() as stop:\n    stop.hold()\n    print('ready', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha512', b'', b'', 10**9)"
    )
    with start(code) as process:
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 128 + signal.SIGINT


def test_signals_during_the_imports_have_the_documented_code():
    code = "import time; from vit_flax.signals import *; exit_on_signals(); print('ready', flush=True); time.sleep(60)"
    with start(code) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == EXIT_PREEMPTED


def test_signals_module_imports_nothing_slow():
    code = "import sys, vit_flax.signals; print([m for m in ('jax', 'numpy', 'flax') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "[]"
