"""A signal that the sleeping main thread was not woken by is heard while it still waits."""

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from multiprocessing import Pipe

import pytest

from sd35bench.workers.waiting import has_answer, result_of

MUTANT_S = 1.0
"""How long the wait that hears nothing is left to it: twice as long as the others sleep."""


@pytest.fixture
def heard() -> Iterator[threading.Event]:
    """Set by SIGUSR1's handler, which runs in the main thread as every handler does."""
    event = threading.Event()
    before = signal.signal(signal.SIGUSR1, lambda *_: event.set())
    yield event
    signal.signal(signal.SIGUSR1, before)


def is_heard_while(wait: Callable[[], object], end: Callable[[], None], heard, patience_s) -> bool:
    """Whether the handler ran before the wait was over.

    Another thread takes the signal, so nothing wakes the main one: as where it comes in the moment
    before the sleep.
    """
    found = []

    def other() -> None:
        sleeping.wait()
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        found.append(heard.wait(patience_s))
        end()

    sleeping = threading.Event()
    thread = threading.Thread(target=other)
    thread.start()
    timer = threading.Timer(0.1, sleeping.set)  # by then the main thread sleeps
    timer.start()
    wait()
    thread.join()
    return found[0]


def test_a_signal_is_heard_while_a_future_is_waited_for(heard):
    future: Future[int] = Future()
    ended = is_heard_while(lambda: result_of(future), lambda: future.set_result(3), heard, 60)
    assert (ended, result_of(future)) == (True, 3)


def test_a_signal_is_heard_while_an_answer_is_waited_for(heard):
    ours, theirs = Pipe()
    wait = lambda: has_answer(ours, 600)  # noqa: E731
    assert is_heard_while(wait, lambda: theirs.send(1), heard, 60)
    assert ours.recv() == 1


def test_mutants_that_sleep_in_one_piece_hear_it_afterwards(heard):
    future: Future[int] = Future()
    assert not is_heard_while(future.result, lambda: future.set_result(3), heard, MUTANT_S)
    heard.clear()
    ours, theirs = Pipe()
    wait = lambda: ours.poll(600)  # noqa: E731
    assert not is_heard_while(wait, lambda: theirs.send(1), heard, MUTANT_S)


def test_no_answer_in_time_is_none_and_an_error_is_raised():
    ours, _theirs = Pipe()
    assert not has_answer(ours, 0.01)
    broken: Future[int] = Future()
    broken.set_exception(KeyError("no"))
    with pytest.raises(KeyError):
        result_of(broken)
