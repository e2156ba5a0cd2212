"""Work within a time limit: it ends in time, and the program's own alarm comes back."""

import contextlib
import signal
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
