"""Signals are obeyed between two steps, at once where nothing can be lost, and within a long call too."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bmjax.training.signals import Interrupted, Signals

ROOT = Path(__file__).resolve().parents[2]
# A call that does not come back to Python for minutes, as a compilation.
LONG = """
import hashlib, sys
from bmjax.training.signals import Signals
with Signals() as signals, signals.gently():
    print("begun", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2 * 10**9)
"""


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_within_a_long_call_the_process_ends_after_some_seconds(number):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", LONG], env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "begun\n"
        sent = time.monotonic()
        process.send_signal(number)
        assert process.wait(60) == 128 + number
        assert time.monotonic() - sent < 6


def test_it_interrupts_at_once_unless_asked_to_be_gentle():
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals, pytest.raises(Interrupted) as caught:
        send(signal.SIGTERM)
    assert caught.value.code == 143
    assert signals.stop == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    with Signals() as signals, signals.gently():
        assert signals.stop is None
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert signals.stop == signal.SIGTERM
        with pytest.raises(Interrupted):
            signals.check()


def test_a_second_interrupt_from_the_keyboard_is_obeyed_at_once():
    with Signals() as signals, signals.gently():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert signals.stop == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_nested_watches_hand_the_signals_back():
    with Signals() as outer, outer.gently():
        with Signals() as inner, inner.gently():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            assert inner.stop == signal.SIGTERM
        assert outer.stop is None
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert outer.stop == signal.SIGTERM
