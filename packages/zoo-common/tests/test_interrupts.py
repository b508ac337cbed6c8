import signal
import threading

import pytest
from zoo_common.interrupts import deferred_interrupt


def test_the_first_interrupt_waits_and_the_second_raises():
    with deferred_interrupt() as pressed:
        assert not pressed()
        signal.raise_signal(signal.SIGINT)
        assert pressed()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_handler_of_the_program_is_left_alone():
    calls = []
    before = signal.signal(signal.SIGINT, lambda *arguments: calls.append(arguments))
    try:
        with deferred_interrupt() as pressed:
            signal.raise_signal(signal.SIGINT)
            assert not pressed() and len(calls) == 1
    finally:
        signal.signal(signal.SIGINT, before)


def test_threads_can_use_it():
    answers = []

    def work():
        with deferred_interrupt() as pressed:
            answers.append(pressed())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [False]
