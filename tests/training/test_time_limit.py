"""Work within a time limit: it ends in time, and the program's own alarm comes back."""

import contextlib
import signal
import sys
import threading
import time

from qlora_jax.training.time_limit import finishes_within


def sleeps_however_often_it_is_woken():
    for _ in range(600):
        with contextlib.suppress(Exception):
            time.sleep(0.1)


def swallows_the_first_alarm():
    try:
        time.sleep(60)
    except BaseException:
        time.sleep(60)


def test_work_that_takes_too_long_is_ended():
    began = time.monotonic()
    assert not finishes_within(0.05, sleeps_however_often_it_is_woken)
    assert not finishes_within(0.05, swallows_the_first_alarm)
    assert time.monotonic() - began < 5


class Finalized:
    """Takes 0.3 s to be finalized, and then raises an error."""

    def __init__(self, error: type[Exception]):
        self.error = error

    def __del__(self):
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            time.sleep(0.01)
        raise self.error


def finalizes_and_sleeps():
    Finalized(KeyError)
    time.sleep(60)


def test_an_alarm_that_python_drops_is_not_printed_and_the_next_one_ends_the_work(monkeypatch):
    """The alarm of an ended run's report was printed, and failed tests, when it came in a finalizer."""
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: printed.append(unraisable.exc_type))

    assert not finishes_within(0.1, finalizes_and_sleeps)
    assert printed == []
    assert finishes_within(60, lambda: Finalized(KeyError))
    assert printed == [KeyError]


def test_an_alarm_spares_the_printing_of_other_errors(monkeypatch):
    printed = []

    def slow_hook(unraisable):
        time.sleep(0.5)
        printed.append(unraisable.exc_type)

    monkeypatch.setattr(sys, "unraisablehook", slow_hook)
    began = time.monotonic()
    assert not finishes_within(0.5, finalizes_and_sleeps)
    assert printed == [KeyError] and time.monotonic() - began < 30


def test_work_that_is_done_in_time_is_whole_and_its_errors_are_raised():
    done = []
    assert finishes_within(60, lambda: done.append(1)) and done == [1]
    try:
        finishes_within(60, lambda: 1 / 0)
    except ZeroDivisionError:
        done.append(2)
    assert done == [1, 2]


def test_the_programs_own_alarm_comes_back():
    def own(number, frame):
        raise AssertionError("too early")

    before = signal.signal(signal.SIGALRM, own)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1000, 7)
        finishes_within(0.01, lambda: time.sleep(60))
        left, interval = signal.getitimer(signal.ITIMER_REAL)
        assert signal.getsignal(signal.SIGALRM) is own and 990 < left <= 1000 and interval == 7
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_another_thread_has_no_limit():
    found = []
    thread = threading.Thread(target=lambda: found.append(finishes_within(0.01, lambda: time.sleep(0.1))))
    thread.start()
    thread.join()
    assert found == [True]
